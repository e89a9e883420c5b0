"""Predicted peaks of plans whose blocks are not all in one memory, and the placement that a budget allows.

The counting of `planning.estimate`, with weights where they live, and the two blocks that are on their way. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from lowmem.kernels.layouts import TILE_BYTES
from lowmem.machine.direct_io import PAGE
from lowmem.models.quantization import BNB
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning import cache, model_bytes
from lowmem.planning.placement import (
    SLOTS,
    Placement,
    block_index,
    counted,
    home,
    stored_block_bytes,
)
from lowmem.planning.plan import Line, MemoryEstimate, Plan


def estimate(plan: Plan, placement: Placement) -> tuple[MemoryEstimate, ...]:
    """Predicted peak per memory, as `estimate.estimate` gives it for a plan without a placement."""
    dtype = model_bytes.compute_dtype(plan.precision, plan.place.dtypes)
    on_gpu = plan.place.kind == "cuda"
    kind = "cuda" if on_gpu else "cpu"
    at_home = home(kind)
    here = _home_bytes(plan, placement, dtype) + _described_bytes(plan, placement)
    if placement.mapped and not on_gpu:
        here += sum(stored_block_bytes(plan.spec)[index] for index in placement.indices("disk"))
    streamed = placement.streamed(kind)
    count = len(placement.indices(at_home))
    running = (
        *_action_lines(plan, dtype),
        Line("scratch", _ring_bytes(plan.spec, streamed), f"{SLOTS} blocks on their way, as they are stored."),
        Line(
            "scratch", _tile_bytes(plan, streamed, dtype, on_gpu), "Stored weights turned into numbers to compute with."
        ),
    )
    # Buffers of the run come into being after loading, so the larger of the two counts.
    loading = _loading_bytes(plan, placement, dtype) - sum(line.count for line in running)
    lines = (
        Line("weights", here, f"{count} of {plan.spec.layers} blocks, and what is no block: {plan.precision_label}."),
        *(model_bytes.kernel_lines(plan) if count else ()),
        *running,
        Line("scratch", max(0, loading), "What loading needs beyond that."),
    )
    runtime = Line(
        "overhead", plan.hardware.runtime_bytes, "Python, torch and transformers themselves, measured on this machine."
    )
    if not on_gpu:
        return (MemoryEstimate("ram", (*lines, runtime), plan.budget.limit("ram")),)
    workspace = Line("overhead", model_bytes.CUDA_WORKSPACE_BYTES, "Workspaces of the GPU libraries.")
    vram = MemoryEstimate("vram", (*lines, workspace), plan.budget.limit("vram"))
    sizes = stored_block_bytes(plan.spec)
    waiting = placement.indices("ram")
    ram_lines = (
        *cache.ram_lines(plan, dtype),
        Line("weights", sum(sizes[index] for index in waiting), f"{len(waiting)} blocks in RAM, as they are stored."),
        Line("scratch", _ring_bytes(plan.spec, placement.indices("disk")), f"{SLOTS} blocks on their way from disk."),
        Line("overhead", model_bytes.CUDA_RAM_BYTES, "The GPU driver and torch's kernels."),
        Line("scratch", 2 * CONVERSION_BYTES, "Weights on their way from disk to the GPU."),
    )
    return (MemoryEstimate("ram", (*ram_lines, runtime), plan.budget.limit("ram")), vram)


def _home_tensors(plan: Plan, placement: Placement) -> list[Tensor]:
    """What stays in the memory of the device that computes."""
    resident = {None, *placement.indices(home(plan.place.kind))}
    return [tensor for tensor in counted(plan.spec) if block_index(tensor.name) in resident]


def _loading_bytes(plan: Plan, placement: Placement, dtype: str) -> int:
    """The most that loading holds beside what stays; on a CPU only packed layers are not read right into their places."""
    tensors = _home_tensors(plan, placement)
    if plan.place.kind == "cpu":
        tensors = [tensor for tensor in tensors if tensor.packed_layer]
    at_home = replace(plan.spec, tensors=tuple(tensors), tied=False)
    return model_bytes.loading_peak(at_home, plan.precision, dtype) - model_bytes.weight_bytes(
        at_home, plan.precision, dtype
    )


def _home_bytes(plan: Plan, placement: Placement, dtype: str) -> int:
    return sum(_held_bytes(plan, tensor, dtype) for tensor in _home_tensors(plan, placement))


def _described_bytes(plan: Plan, placement: Placement) -> int:
    """What describes bitsandbytes' 4-bit codes stays at home while the codes stream."""
    streamed = placement.streamed(plan.place.kind)
    return sum(t.nbytes for t in counted(plan.spec) if ".weight." in t.name and block_index(t.name) in streamed)


def _held_bytes(plan: Plan, tensor: Tensor, dtype: str) -> int:
    packed = plan.precision == "stored" and tensor.packed_layer
    if packed or plan.place.kind != "cpu":
        return model_bytes.tensor_bytes(plan.spec, tensor, plan.precision, dtype)
    # Beside streamed blocks a CPU keeps matrices as they are stored.
    return tensor.nbytes if len(tensor.shape) > 1 else tensor.elements * DTYPE_BYTES[dtype]


def _action_lines(plan: Plan, dtype: str) -> tuple[Line, ...]:
    spec, batch = plan.spec, plan.batch
    chunk = min(plan.prefill_chunk, plan.context)
    activations = model_bytes.attending_bytes(plan, dtype)
    return (
        Line("kv", cache.device_bytes(plan, dtype), cache.sentence(plan, dtype)),
        Line(
            "activations",
            activations + model_bytes.logits_bytes(spec, batch, dtype),
            f"One block at work on {chunk:,} tokens x {batch}, and the logits.",
        ),
        Line("scratch", cache.unfolded_bytes(plan, dtype), "A layer of the quantized cache, unfolded."),
    )


def _ring_bytes(spec: ModelSpec, streamed: tuple[int, ...]) -> int:
    if not streamed:
        return 0
    sizes = stored_block_bytes(spec)
    # A range of a file is read in whole pages, and a buffer begins on one.
    return min(SLOTS, len(streamed)) * (max(sizes[index] for index in streamed) + 3 * PAGE)


def _tile_bytes(plan: Plan, streamed: tuple[int, ...], dtype: str, on_gpu: bool) -> int:
    spec = plan.spec
    if plan.precision == "stored":
        largest = max((rows * columns for rows, columns in spec.packed_layers.values()), default=0)
        whole = largest * (DTYPE_BYTES[dtype] + 4)
        if spec.stored and spec.stored.method == BNB and spec.stored.bits == 4:
            return largest * DTYPE_BYTES[dtype]  # bitsandbytes multiplies a layer out in one piece
    elif any(t.dtype != dtype and len(t.shape) > 1 for t in counted(spec)):
        matrices = (t for t in counted(spec) if len(t.shape) > 1 and block_index(t.name) in streamed)
        whole = max((t.elements * DTYPE_BYTES[dtype] for t in matrices), default=0)
    else:
        whole = 0
    return whole if on_gpu else min(whole, 2 * TILE_BYTES)
