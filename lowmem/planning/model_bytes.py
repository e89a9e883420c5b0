"""Bytes of a model's weights and activations, by exact accounting from shapes.

Weights and KV cache are counted to the byte from the checkpoint's header. Activations are
the tensors alive together at the widest point of one decoder block. Nothing here is fitted
to measurements; `benchmarks/promise.py` shows the error of the prediction.
"""

from __future__ import annotations

from lowmem.kernels import layouts
from lowmem.messages import msg
from lowmem.models.quantization import BNB
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning import cache
from lowmem.planning.placement import block_index
from lowmem.planning.plan import Line, Plan
from lowmem.precisions import PRECISIONS
from lowmem.units import MB

CUDA_WORKSPACE_BYTES = 96 * MB
"""cuBLAS workspaces (32 MiB a handle on Hopper, 8 MiB before) and the rounding of torch's allocator."""

CUDA_RAM_BYTES = 900 * MB
"""RAM that the CUDA driver and torch's kernels take in the process once a GPU is used."""

HEAP_FRAGMENTATION = 2
"""glibc's heap over the live tensors in a pass without a cache: freed tensors leave holes that the next ones do not fit
(measured for 512 to 4,096 tokens: 2.0 to 2.2 times in int8, 1.3 to 1.8 in fp32)."""

EAGER_ATTENTION = frozenset({"gemma2", "gpt_neo", "gptj", "mpt"})
"""Model types whose attention has no fused kernel in transformers, so the score matrix is materialized."""


def compute_dtype(precision: str, device_dtypes: tuple[str, ...]) -> str:
    """The dtype of activations and KV cache: the precision's own, else the device's best."""
    return PRECISIONS[precision].dtype or device_dtypes[0]


def is_linear(tensor: Tensor) -> bool:
    """Whether this is the weight of a linear layer in a decoder block, which is what gets quantized."""
    return (
        len(tensor.shape) == 2
        and tensor.name.endswith(".weight")
        and block_index(tensor.name) is not None
        and not tensor.is_buffer
    )


def is_embedding(tensor: Tensor) -> bool:
    """Whether this is a token or position embedding, or the output head."""
    return len(tensor.shape) == 2 and tensor.name.endswith("weight") and block_index(tensor.name) is None


def weight_bytes(spec: ModelSpec, precision: str, dtype: str) -> int:
    """Bytes of the loaded weights, exact for the layout of each precision.

    Args:
        dtype: the compute dtype, in which unquantized tensors are held.
    """
    total = 0
    for tensor in spec.tensors:
        if tensor.is_buffer or (spec.tied and tensor.is_output_embedding):
            continue
        total += tensor_bytes(spec, tensor, precision, dtype)
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    if dense.covers_embeddings and spec.tied:
        # A packed output head cannot be indexed, so a tied embedding is held twice.
        total += dense.linear_bytes(spec.vocab, spec.hidden)
    return total


def tensor_bytes(spec: ModelSpec, tensor: Tensor, precision: str, dtype: str) -> int:
    if spec.stored and tensor.packed_layer:
        if spec.stored.method == BNB:
            return tensor.nbytes  # held as stored
        # All parts of a layer are counted with its weight.
        layer = _packed_shape(spec, tensor)
        return layouts.packed_bytes(spec.stored, *layer, dtype) if layer else 0
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    if is_linear(tensor) and dense.quantizes((shape := linear_shape(spec, tensor))[1]):
        return dense.linear_bytes(*shape)
    if dense.covers_embeddings and is_embedding(tensor):
        rows, columns = tensor.shape
        return (dense.linear_bytes if tensor.is_output_embedding else dense.embedding_bytes)(rows, columns)
    return tensor.elements * DTYPE_BYTES[dtype]


def _packed_shape(spec: ModelSpec, tensor: Tensor) -> tuple[int, int] | None:
    """(outputs, inputs) where `tensor` is a packed weight, None for the other parts of a packed layer."""
    if not spec.stored or not tensor.is_packed_weight:
        return None
    return spec.stored.linear_shape((tensor.shape[0], tensor.shape[1]))


def linear_shape(spec: ModelSpec, tensor: Tensor) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; GPT-2 stores its weights transposed."""
    first, second = tensor.shape
    return (second, first) if spec.model_type == "gpt2" else (first, second)


def activation_bytes(spec: ModelSpec, tokens: int, context: int, dtype: str) -> int:
    """Peak of one decoder block over `tokens` = chunk x batch new tokens that attend to `context` tokens.

    Counted: the residual stream and its normed fp32 copy; then the larger of attention
    (q, k, v, their rotated copies, the output) and the MLP (gate, its activation, up, their
    product); and the attention mask and repeated keys and values of a chunk that does not
    start the sequence.
    """
    size = DTYPE_BYTES[dtype]
    residual = tokens * spec.hidden * (3 * size + 2 * 4)
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = tokens * (4 * q_width + 4 * kv_width) * size
    mlp = tokens * 4 * spec.intermediate * size
    return residual + max(attention, mlp) + _masked_attention_bytes(spec, tokens, context, size)


def activation_line(plan: Plan, dtype: str) -> Line:
    """Activations of the widest forward pass that `plan` makes, and one row of logits per sequence."""
    chunk = min(plan.prefill_chunk, plan.context)
    alive = max(
        activation_bytes(plan.spec, min(chunk, most) * plan.batch, seen, dtype) for most, seen in cache.passes(plan)
    )
    # With a cache, chunks are short and the cache is not yet full, so its room absorbs the holes.
    if plan.cache_type == "none" and plan.place.kind == "cpu":
        alive *= HEAP_FRAGMENTATION
    total = alive + logits_bytes(plan.spec, plan.batch, dtype)
    return Line(
        "activations",
        total,
        msg("One block processing {chunk:,} tokens x {batch}, and the logits.", chunk=chunk, batch=plan.batch),
    )


def _masked_attention_bytes(spec: ModelSpec, tokens: int, context: int, size: int) -> int:
    if context <= tokens and spec.model_type not in EAGER_ATTENTION:
        return 0
    # The boolean mask, the two operands it is made from, and its copy in the compute dtype.
    mask = tokens * context * (3 + size)
    history = 2 * spec.heads * spec.head_dim * context * size
    repeated = history if spec.heads != spec.kv_heads else 0
    if size == 2:
        repeated += history  # matrix kernels repack half precision
    scores = 2 * spec.heads * tokens * context * 4 if spec.model_type in EAGER_ATTENTION else 0
    return mask + repeated + scores


def logits_bytes(spec: ModelSpec, batch: int, dtype: str) -> int:
    """One row of logits per sequence: in fp32, sorted with its indices, and summed for top-p."""
    return batch * spec.vocab * (DTYPE_BYTES[dtype] + 4 * 4 + 2 * 8)


def kernel_lines(plan: Plan) -> tuple[Line, ...]:
    """ONNX Runtime, where its kernels run a quantized checkpoint. Counted as weights: it is loaded with the model."""
    stored = plan.spec.stored if plan.precision == "stored" and plan.place.kind == "cpu" else None
    if stored is None or layouts.cpu_kernel(stored) != "nbits":
        return ()
    return (Line("weights", layouts.ONNX_RUNTIME_BYTES, msg("ONNX Runtime, whose kernels run the quantized layers.")),)


def loading_peak(spec: ModelSpec, precision: str, dtype: str) -> int:
    """Most bytes the loader holds at once: finished tensors, and the current one with its temporaries.

    Follows the loader through the file: a large embedding at the beginning costs little, since
    nothing else is loaded yet.
    """
    finished = peak = 0
    for tensor in spec.tensors:
        if tensor.is_buffer or (spec.tied and tensor.is_output_embedding):
            continue
        final = tensor_bytes(spec, tensor, precision, dtype)
        peak = max(peak, finished + final + _temporary_bytes(spec, tensor, precision, dtype))
        finished += final
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    if dense.covers_embeddings and spec.tied:
        # Packing the head copies the embedding's codes.
        finished += dense.linear_bytes(spec.vocab, spec.hidden)
        peak = max(peak, finished + spec.vocab * spec.hidden)
    return max(peak, finished)


def _temporary_bytes(spec: ModelSpec, tensor: Tensor, precision: str, dtype: str) -> int:
    if spec.stored and spec.stored.method == BNB and tensor.packed_layer:
        return 0
    if layer := _packed_shape(spec, tensor):
        return layouts.repacking_bytes(*layer)
    source = tensor.elements * DTYPE_BYTES.get(tensor.dtype, 4)
    dense = PRECISIONS[precision].dense(dtype, spec.stored)
    quantized = is_linear(tensor) and dense.quantizes(linear_shape(spec, tensor)[1])
    if quantized or (dense.covers_embeddings and is_embedding(tensor)):
        rows, columns = tensor.shape
        return source + dense.temporary_bytes(rows, columns, dtype)
    return min(source, CONVERSION_BYTES)
