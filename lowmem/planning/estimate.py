"""The estimate of a plan: predicted peak bytes in every memory, line by line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowmem.kernels import layouts
from lowmem.messages import msg
from lowmem.models.spec import CONVERSION_BYTES
from lowmem.planning import cache, exported, streaming
from lowmem.planning.model_bytes import (
    CUDA_RAM_BYTES,
    CUDA_WORKSPACE_BYTES,
    TEMPLATE_PROCESS_BYTES,
    activation_line,
    compute_dtype,
    kernel_lines,
    loading_peak,
    logits_bytes,
    tokenizer_line,
    weight_bytes,
)
from lowmem.planning.plan import Line, MemoryEstimate, Plan
from lowmem.units import format_bytes

_TEMPLATES = Line("overhead", TEMPLATE_PROCESS_BYTES, msg("The process that renders the chat template."))


def estimate(plan: Plan) -> tuple[MemoryEstimate, ...]:
    """Predicted peak of RAM and, on a GPU, of VRAM. Does not read `plan.estimates`."""
    dtype, placement = compute_dtype(plan.precision, plan.place.dtypes), plan.placement
    on_device = streaming.device_lines(plan, placement, dtype) if placement else _device_lines(plan, dtype)
    process = Line(
        "overhead", plan.hardware.runtime_bytes, msg("Python, torch and transformers, measured on this machine.")
    )
    texts = (tokenizer_line(plan.spec), *((_TEMPLATES,) if plan.chat else ()))
    if plan.place.kind != "cuda":
        return (_against_budget(plan, "ram", (*on_device, process, *texts)),)
    workspace = Line("overhead", CUDA_WORKSPACE_BYTES, msg("Workspaces of the GPU libraries."))
    in_ram = (
        *cache.ram_lines(plan, dtype),
        *(streaming.ram_lines(plan, placement) if placement else ()),
        process,
        *texts,
        Line("overhead", CUDA_RAM_BYTES, msg("The GPU driver and torch's kernels.")),
        Line("scratch", 2 * CONVERSION_BYTES, msg("Weights in transit from disk to the GPU.")),
    )
    return (_against_budget(plan, "ram", in_ram), _against_budget(plan, "vram", (*on_device, workspace)))


def reestimate(plan: Plan, **changes: Any) -> Plan:
    """`plan` with `changes` to its fields and new estimates; it moves to torch if a graph does not support the changes."""
    changed = replace(plan, **changes)
    if changed.backend == "onnx" and needs_torch(changed):
        changed = replace(changed, backend="torch", or_torch=False)
    return replace(changed, estimates=estimate(changed))


def needs_torch(plan: Plan) -> bool:
    """Whether a graph cannot run `plan`: its weights are all resident, its KV cache is fp32 and holds every token."""
    return plan.placement is not None or plan.window > 0 or plan.cache_type not in ("same", "none")


def _against_budget(plan: Plan, memory: str, lines: tuple[Line, ...]) -> MemoryEstimate:
    return MemoryEstimate(memory, lines, plan.budget.limit(memory))


def _device_lines(plan: Plan, dtype: str) -> tuple[Line, ...]:
    """Memory parts of the device that computes in `dtype`, without the process itself."""
    if plan.backend == "onnx":
        return _graph_lines(plan)
    spec = plan.spec
    weights = weight_bytes(spec, plan.precision, dtype)
    kv, activations = cache.device_bytes(plan, dtype), activation_line(plan, dtype)
    # The run allocates its cache and activations after loading, so only the larger of the two counts.
    loading = loading_peak(spec, plan.precision, dtype) - weights - kv - activations.count
    dequantized = layouts.dense_bytes(spec, dtype) if plan.precision == "stored" else 0
    scratch = max(cache.dequantized_bytes(plan, dtype), dequantized, loading, 0)
    return (
        Line(
            "weights",
            weights,
            msg(
                "{parameters:,.0f} million parameters, {precision_label}.",
                parameters=spec.parameters / 1000000.0,
                precision_label=plan.precision_label,
            ),
        ),
        Line("kv", kv, cache.sentence(plan, dtype)),
        activations,
        Line("scratch", scratch, msg("Buffers for loading, or for one dequantized layer of weights or cache.")),
        *kernel_lines(plan),
    )


def _graph_lines(plan: Plan) -> tuple[Line, ...]:
    spec, batch, chunk = plan.spec, plan.batch, min(plan.prefill_chunk, plan.context)
    kv = exported.kv_bytes(spec, plan.cached_tokens, batch) if plan.cache_type != "none" else 0
    activations = exported.activation_bytes(spec, chunk, plan.context, batch, plan.precision) + logits_bytes(
        spec, batch, "fp32"
    )
    per_token = format_bytes(exported.kv_bytes(spec, 1, 1))
    weights = exported.session_bytes(spec, plan.precision)
    return (
        Line(
            "weights",
            weights,
            msg(
                "{parameters:,.0f} million parameters, {precision_label}, as graphs.",
                parameters=spec.parameters / 1000000.0,
                precision_label=plan.precision_label,
            ),
        ),
        Line(
            "kv",
            kv,
            msg(
                "{cached_tokens:,} tokens x {batch}, {per_token} per token (fp32).",
                cached_tokens=plan.cached_tokens,
                batch=batch,
                per_token=per_token,
            ),
        ),
        Line("activations", activations, msg("One block processing {chunk:,} tokens, and the logits.", chunk=chunk)),
        Line("weights", layouts.ONNX_RUNTIME_BYTES, msg("ONNX Runtime, which runs the graphs.")),
        Line("scratch", 0, msg("Graphs are mapped, not copied.")),
    )
