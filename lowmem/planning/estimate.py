"""The predicted peak of a plan in every memory, share by share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowmem.kernels import layouts
from lowmem.models.spec import CONVERSION_BYTES
from lowmem.planning import cache, exported, streaming
from lowmem.planning.model_bytes import (
    CUDA_RAM_BYTES,
    CUDA_WORKSPACE_BYTES,
    attending_bytes,
    compute_dtype,
    kernel_lines,
    loading_peak,
    logits_bytes,
    weight_bytes,
)
from lowmem.planning.plan import Line, MemoryEstimate, Plan
from lowmem.units import format_bytes


def estimate(plan: Plan) -> tuple[MemoryEstimate, ...]:
    """Predicted peak per memory for `plan` (its own `estimates` are ignored): RAM, and VRAM on a GPU."""
    if plan.placement is not None:
        return streaming.estimate(plan, plan.placement)
    on_gpu = plan.place.kind == "cuda"
    dtype = compute_dtype(plan.precision, plan.place.dtypes)
    lines = _run_lines(plan, dtype)
    waiting = cache.ram_lines(plan, dtype)
    runtime = Line(
        "overhead", plan.hardware.runtime_bytes, "Python, torch and transformers themselves, measured on this machine."
    )
    if not on_gpu:
        return (MemoryEstimate("ram", (*lines, runtime), plan.budget.limit("ram")),)
    workspace = Line("overhead", CUDA_WORKSPACE_BYTES, "Workspaces of the GPU libraries.")
    vram = MemoryEstimate("vram", (*lines, workspace), plan.budget.limit("vram"))
    driver = Line("overhead", CUDA_RAM_BYTES, "The GPU driver and torch's kernels.")
    slab = Line("scratch", 2 * CONVERSION_BYTES, "Weights on their way from disk to the GPU.")
    return (MemoryEstimate("ram", (*waiting, runtime, driver, slab), plan.budget.limit("ram")), vram)


def _run_lines(plan: Plan, dtype: str) -> tuple[Line, ...]:
    if plan.backend == "onnx":
        return _graph_lines(plan)
    spec, batch = plan.spec, plan.batch
    chunk = min(plan.prefill_chunk, plan.context)
    weights = weight_bytes(spec, plan.precision, dtype)
    kv = cache.device_bytes(plan, dtype)
    activations = attending_bytes(plan, dtype) + logits_bytes(spec, batch, dtype)
    dequantized = cache.unfolded_bytes(plan, dtype)
    loading = loading_peak(spec, plan.precision, dtype) - weights
    dense = layouts.dense_bytes(spec, dtype) if plan.precision == "stored" else 0
    scratch = max(dequantized, dense, loading - kv - activations)
    return (
        Line("weights", weights, f"{spec.parameters / 1e6:,.0f} million parameters, {plan.precision_label}."),
        Line(
            "kv",
            kv,
            cache.sentence(plan, dtype),
        ),
        Line("activations", activations, f"One block at work on {chunk:,} tokens x {batch}, and the logits."),
        Line("scratch", max(0, scratch), "Buffers while loading, for a quantized cache or a layer multiplied out."),
        *kernel_lines(plan),
    )


def _graph_lines(plan: Plan) -> tuple[Line, ...]:
    spec, batch, chunk = plan.spec, plan.batch, min(plan.prefill_chunk, plan.context)
    kv = exported.kv_bytes(spec, plan.remembered, batch) if plan.kv != "none" else 0
    activations = exported.activation_bytes(spec, chunk, plan.context, batch) + logits_bytes(spec, batch, "fp32")
    per_token = format_bytes(exported.kv_bytes(spec, 1, 1))
    weights = exported.session_bytes(spec, plan.precision)
    return (
        Line(
            "weights", weights, f"{spec.parameters / 1e6:,.0f} million parameters, {plan.precision_label}, as graphs."
        ),
        Line("kv", kv, f"{plan.remembered:,} tokens x {batch} at {per_token} a token (fp32)."),
        Line("activations", activations, f"One block at work on {chunk:,} tokens, and the logits."),
        Line("weights", layouts.ONNX_RUNTIME_BYTES, "ONNX Runtime, which runs the graphs."),
        Line("scratch", 0, "Graphs are mapped, not copied."),
    )


def needs_torch(plan: Plan) -> bool:
    """A graph's weights are all in memory, and its cache is in fp32 and of all tokens."""
    return plan.placement is not None or plan.window > 0 or plan.kv not in ("same", "none")


def reestimate(plan: Plan, **changes: Any) -> Plan:
    """`plan` with `changes` and its estimates computed anew. What a graph cannot do makes it a plan for torch."""
    changed = replace(plan, **changes)
    if changed.backend == "onnx" and needs_torch(changed):
        changed = replace(changed, backend="torch", or_torch=False)
    return replace(changed, estimates=estimate(changed))
