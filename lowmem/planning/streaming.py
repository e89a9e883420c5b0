"""Predicted memory of plans whose blocks are not all resident: weights where they live, and the blocks in transit.

Pure arithmetic on shapes, as in `planning.model_bytes`.
"""

from __future__ import annotations

from dataclasses import replace

from lowmem.kernels.layouts import TILE_BYTES
from lowmem.machine.direct_io import PAGE
from lowmem.messages import msg
from lowmem.models.quantization import BNB
from lowmem.models.spec import DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning import cache, model_bytes
from lowmem.planning.placement import (
    SLOTS,
    Placement,
    block_index,
    resident_place,
    stored_block_bytes,
)
from lowmem.planning.plan import Line, Plan


def device_lines(plan: Plan, placement: Placement, dtype: str) -> tuple[Line, ...]:
    """Memory parts of the device that computes in `dtype`, without the process itself."""
    kind = plan.place.kind
    weights = sum(_resident_bytes(plan, tensor, dtype) for tensor in _resident_tensors(plan, placement))
    weights += _quantization_state_bytes(plan, placement)
    if placement.mapped and kind == "cpu":
        weights += sum(stored_block_bytes(plan.spec)[index] for index in placement.indices("disk"))
    streamed = placement.streamed(kind)
    resident = len(placement.indices(resident_place(kind)))
    running = (
        Line("kv", cache.device_bytes(plan, dtype), cache.sentence(plan, dtype)),
        model_bytes.activation_line(plan, dtype),
        Line("scratch", cache.dequantized_bytes(plan, dtype), msg("One dequantized layer of the KV cache.")),
        Line(
            "scratch",
            _ring_bytes(plan.spec, streamed),
            msg("{slots} blocks in transit, as stored on disk.", slots=SLOTS),
        ),
        Line(
            "scratch",
            _tile_bytes(plan, streamed, dtype) + _decoded_bytes(plan.spec, streamed),
            msg("Weights dequantized or converted for computing."),
        ),
    )
    # The run allocates its buffers after loading, so only the larger of the two counts.
    loading = _loading_bytes(plan, placement, dtype) - sum(line.count for line in running)
    return (
        Line(
            "weights",
            weights,
            msg(
                "{resident} of {layers} blocks, embeddings and output head: {precision_label}.",
                resident=resident,
                layers=plan.spec.layers,
                precision_label=plan.precision_label,
            ),
        ),
        *(model_bytes.kernel_lines(plan) if resident else ()),
        *running,
        Line("scratch", max(0, loading), msg("Buffers while loading.")),
    )


def ram_lines(plan: Plan, placement: Placement) -> tuple[Line, ...]:
    """RAM parts while a GPU computes, without the process itself."""
    sizes, in_ram = stored_block_bytes(plan.spec), placement.indices("ram")
    return (
        Line(
            "weights",
            sum(sizes[index] for index in in_ram),
            msg("{in_ram} blocks in RAM, as stored on disk.", in_ram=len(in_ram)),
        ),
        Line(
            "scratch",
            _ring_bytes(plan.spec, placement.indices("disk")),
            msg("{slots} blocks in transit from disk.", slots=SLOTS),
        ),
    )


def _resident_tensors(plan: Plan, placement: Placement) -> list[Tensor]:
    blocks = {None, *placement.indices(resident_place(plan.place.kind))}
    return [tensor for tensor in plan.spec.tensors if block_index(tensor.name) in blocks]


def _loading_bytes(plan: Plan, placement: Placement, dtype: str) -> int:
    """Peak of loading beyond the resident weights; on a CPU only packed layers are not read straight into place."""
    tensors = _resident_tensors(plan, placement)
    if plan.place.kind == "cpu":
        tensors = [tensor for tensor in tensors if tensor.packed_layer]
    loaded = replace(plan.spec, tensors=tuple(tensors), tied=False)
    weights = model_bytes.weight_bytes(loaded, plan.precision, dtype)
    return model_bytes.loading_peak(loaded, plan.precision, dtype) - weights


def _quantization_state_bytes(plan: Plan, placement: Placement) -> int:
    """Scales of bitsandbytes' 4-bit weights: they stay resident while the codes stream."""
    streamed = placement.streamed(plan.place.kind)
    return sum(t.nbytes for t in plan.spec.tensors if ".weight." in t.name and block_index(t.name) in streamed)


def _resident_bytes(plan: Plan, tensor: Tensor, dtype: str) -> int:
    packed = (plan.precision == "stored" and tensor.packed_layer) or tensor.packed_rows
    if packed or plan.place.kind != "cpu":
        return model_bytes.tensor_bytes(plan.spec, tensor, plan.precision, dtype)
    # Beside streamed blocks, matrices on a CPU stay in their stored format.
    if len(tensor.shape) < 2:
        return tensor.elements * DTYPE_BYTES[dtype]
    return tensor.elements * DTYPE_BYTES[tensor.dtype] if tensor.decoded else tensor.nbytes


def _ring_bytes(spec: ModelSpec, streamed: tuple[int, ...]) -> int:
    """The ring buffer that blocks stream through."""
    if not streamed:
        return 0
    sizes = stored_block_bytes(spec)
    # A range of a file is read in whole pages, and a buffer begins on one.
    return min(SLOTS, len(streamed)) * (max(sizes[index] for index in streamed) + 3 * PAGE)


def _decoded_bytes(spec: ModelSpec, streamed: tuple[int, ...]) -> int:
    """The weights of the largest streamed block that are dequantized once it has arrived."""
    blocks = dict.fromkeys(streamed, 0)
    for tensor in spec.tensors:
        if spec.dequantized and tensor.decoded and (index := block_index(tensor.name)) in blocks:
            blocks[index] += tensor.elements * DTYPE_BYTES[tensor.dtype]
    return max(blocks.values(), default=0)


def _tile_bytes(plan: Plan, streamed: tuple[int, ...], dtype: str) -> int:
    """Weights in the compute dtype while one layer computes: a whole layer on a GPU, two tiles on a CPU."""
    spec = plan.spec
    if plan.precision == "stored":
        largest = max((rows * columns for rows, columns in spec.packed_layers.values()), default=0)
        whole = largest * (DTYPE_BYTES[dtype] + 4)
        if spec.stored and spec.stored.method == BNB and spec.stored.bits == 4:
            return largest * DTYPE_BYTES[dtype]  # bitsandbytes dequantizes a layer in one piece
    elif any(t.dtype != dtype and len(t.shape) > 1 for t in spec.tensors):
        matrices = (t for t in spec.tensors if len(t.shape) > 1 and block_index(t.name) in streamed)
        whole = max((t.elements * DTYPE_BYTES[dtype] for t in matrices), default=0)
    else:
        whole = 0
    return whole if plan.place.kind == "cuda" else min(whole, 2 * TILE_BYTES)
