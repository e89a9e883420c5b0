"""Bytes of a model's weights and activations, by exact accounting from shapes.

Weights and KV cache are counted to the byte from the checkpoint's header. Activations are
the tensors alive together at the widest point of one decoder block. Nothing here is fitted
to measurements; `benchmarks/promise.py` shows the error of the prediction.
"""

from __future__ import annotations

from lowmem.kernels import layouts
from lowmem.machine.monitor import HeapTrimmer
from lowmem.messages import msg
from lowmem.models.quantization import BNB
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning import cache
from lowmem.planning.placement import read_per_token
from lowmem.planning.plan import Line, Plan
from lowmem.precisions import PRECISIONS, Precision
from lowmem.units import MB

CUDA_WORKSPACE_BYTES = 96 * MB
"""cuBLAS workspaces (32 MiB a handle on Hopper, 8 MiB before) and the rounding of torch's allocator."""

TEMPLATE_PROCESS_BYTES = 25 * MB
"""RSS of a Python that has imported jinja2, measured."""

CUDA_RAM_BYTES = 900 * MB
"""RAM that the CUDA driver and torch's kernels take in the process once a GPU is used."""

TOKENIZER_BYTES = 350
"""Of every entry of a vocabulary, with its merge (tokenizers 0.22, BPE: 345 with 49,152 entries, 349 with 262,144)."""


def tokenizer_line(spec: ModelSpec) -> Line:
    """The tokenizer, which has an entry for every row of the embedding."""
    return Line("overhead", spec.vocab * TOKENIZER_BYTES, msg("The tokenizer, {vocab:,} entries.", vocab=spec.vocab))


def compute_dtype(precision: str, device_dtypes: tuple[str, ...]) -> str:
    """The dtype of activations and KV cache: the precision's own, else the device's best."""
    return PRECISIONS[precision].dtype or device_dtypes[0]


def weight_bytes(spec: ModelSpec, precision: str, dtype: str) -> int:
    """Bytes of the loaded weights, exact for the layout of each precision.

    Args:
        dtype: the compute dtype, in which unquantized tensors are held.
    """
    total = 0
    for tensor in spec.tensors:
        total += tensor_bytes(spec, tensor, precision, dtype)
    return total


def bytes_per_token(spec: ModelSpec, precision: str, dtype: str) -> int:
    """Bytes of weights that one token reads; see `read_per_token`. Arguments as for `weight_bytes`."""
    return sum(int(share * tensor_bytes(spec, tensor, precision, dtype)) for tensor, share in read_per_token(spec))


def tensor_bytes(spec: ModelSpec, tensor: Tensor, precision: str, dtype: str) -> int:
    if spec.stored and tensor.packed_layer:
        if spec.stored.method == BNB:
            return tensor.nbytes  # held as stored
        # All parts of a layer are counted with its weight.
        layer = _packed_shape(spec, tensor)
        return layouts.packed_bytes(spec.stored.at(tensor.packing), *layer, dtype) if layer else 0
    if tensor.packed_rows:
        return tensor.nbytes  # held as stored
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    if quantized(dense, tensor):
        count, rows, columns = tensor.matrices
        return count * (dense.embedding_bytes if tensor.role == "embedding" else dense.linear_bytes)(rows, columns)
    return tensor.elements * (4 if tensor.wide else DTYPE_BYTES[dtype])


def quantized(dense: Precision, tensor: Tensor) -> bool:
    """Whether the loader holds a tensor in fewer bits: linear layers of the blocks, and what else the precision covers."""
    if tensor.role in ("linear", "experts"):
        return dense.quantizes(tensor.matrices[2])
    return dense.covers_embeddings and tensor.role in ("head", "embedding")


def _packed_shape(spec: ModelSpec, tensor: Tensor) -> tuple[int, int] | None:
    """(outputs, inputs) where `tensor` is a packed weight, None for the other parts of a packed layer."""
    if not spec.stored or not tensor.is_packed_weight:
        return None
    return spec.stored.at(tensor.packing).linear_shape((tensor.shape[0], tensor.shape[1]))


def activation_bytes(spec: ModelSpec, tokens: int, context: int, batch: int, dtype: str) -> int:
    """Peak of a forward pass over `tokens` new tokens of each of `batch` rows, which see `context` tokens.

    `ModelSpec.activation_bytes` follows the tensors of the family's code. What a matrix kernel takes inside is added:
    on a CPU, attention repacks keys and values of half precision.
    """
    repacked = 2 * spec.heads * spec.head_dim * context * DTYPE_BYTES[dtype] * batch
    history = repacked if DTYPE_BYTES[dtype] == 2 and context > tokens else 0
    return spec.activation_bytes(tokens, context, batch, dtype) + history


def activation_line(plan: Plan, dtype: str) -> Line:
    """Activations of the widest forward pass that `plan` makes, and one row of logits per sequence."""
    chunk = min(plan.prefill_chunk, plan.context)
    alive = max(
        activation_bytes(plan.spec, min(chunk, most), seen, plan.batch, dtype) for most, seen in cache.passes(plan)
    )
    alive += min(chunk, plan.context) * plan.batch * _kernel_bytes_per_token(plan, dtype)
    if plan.place.kind == "cpu":  # freed tensors leave holes in the heap, which are returned once they are that large
        alive += min(alive, HeapTrimmer.GROWTH)
    total = alive + logits_bytes(plan.spec, plan.batch, dtype)
    return Line(
        "activations",
        total,
        msg("One block processing {chunk:,} tokens x {batch}, and the logits.", chunk=chunk, batch=plan.batch),
    )


def _kernel_bytes_per_token(plan: Plan, dtype: str) -> int:
    """What the widest quantized layer holds of a token while it computes, besides what `activation_bytes` follows."""
    dense = PRECISIONS[plan.precision].dense(dtype, plan.spec.stored)
    layers = (
        tensor.matrices[1:] for tensor in plan.spec.tensors if tensor.role == "linear" and not tensor.packed_layer
    )
    return max((dense.pass_bytes(rows, columns) for rows, columns in layers), default=0)


def logits_bytes(spec: ModelSpec, batch: int, dtype: str) -> int:
    """One row of logits per sequence: in fp32, sorted with its indices, and summed for top-p."""
    return batch * spec.vocab * (DTYPE_BYTES[dtype] + 4 * 4 + 2 * 8)


def kernel_lines(plan: Plan) -> tuple[Line, ...]:
    """ONNX Runtime, where its kernels run a quantized checkpoint. Counted as weights: it is loaded with the model."""
    stored = plan.spec.stored if plan.precision == "stored" and plan.place.kind == "cpu" else None
    if stored is None or all(layouts.cpu_kernel(one) != "nbits" for one in plan.spec.packings):
        return ()
    return (Line("weights", layouts.ONNX_RUNTIME_BYTES, msg("ONNX Runtime, whose kernels run the quantized layers.")),)


def loading_peak(spec: ModelSpec, precision: str, dtype: str) -> int:
    """Most bytes the loader holds at once: finished tensors, and the current one with its temporaries.

    Follows the loader through the file: a large embedding at the beginning costs little, since
    nothing else is loaded yet.
    """
    finished = peak = 0
    for tensor in spec.tensors:
        final = tensor_bytes(spec, tensor, precision, dtype)
        peak = max(peak, finished + final + _temporary_bytes(spec, tensor, precision, dtype))
        finished += final
    return max(peak, finished)


def _temporary_bytes(spec: ModelSpec, tensor: Tensor, precision: str, dtype: str) -> int:
    if tensor.packed_rows or (spec.stored and spec.stored.method == BNB and tensor.packed_layer):
        return 0
    if layer := _packed_shape(spec, tensor):
        return layouts.repacking_bytes(*layer)
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    if quantized(dense, tensor):
        count, rows, columns = tensor.matrices
        if tensor.role == "embedding":  # read and quantized some rows at a time
            return 6 * layouts.ROWS_AT_WORK_BYTES
        source = tensor.elements // count * DTYPE_BYTES.get(tensor.dtype, 4)
        return source + dense.temporary_bytes(rows, columns, dtype)
    return min(tensor.elements * DTYPE_BYTES.get(tensor.dtype, 4), CONVERSION_BYTES)
