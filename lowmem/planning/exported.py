"""Estimates of exported graphs: bytes on disk, in a session, and while exporting. Imports neither torch nor onnxruntime.

Layouts are those of `lowmem.export`: MatMulNBits' blocks, dynamic int8 matrices, fp32 for the rest.
"""

from __future__ import annotations

import functools
import importlib.util

from lowmem.kernels.layouts import ONNX_RUNTIME_BYTES, nbits_bytes
from lowmem.machine.rates import Unmeasured, correction, known_rate
from lowmem.messages import msg
from lowmem.models.spec import DTYPE_BYTES, ModelSpec
from lowmem.planning.graph_options import ExportOptions
from lowmem.precisions.int8 import PRECISION as INT8
from lowmem.units import MB

HEAD_BITS, HEAD_GROUP = 8, 64
"""Embedding and output head of int8 and int4 graphs, and all layers of int8: blocks of 64 inputs, symmetric."""

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})
"""Model types with a fused graph (`lowmem.export.fused`)."""


HEAD_MULTIPLE = 16
"""What the size of heads must be a multiple of in GroupQueryAttention with rotation (onnxruntime 1.32)."""


def missing() -> str | None:
    """The missing packages that graphs need, in a sentence; None if they are installed."""
    if absent := [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]:
        return msg(
            "{absent} is not installed: pip install {package}.", absent=" and ".join(absent), package=" ".join(absent)
        )
    return None


def refusal(spec: ModelSpec) -> str | None:
    """Why `spec` has no fused graph, judging by its shape; None if it can have one."""
    if absent := missing():
        return absent
    if spec.exported:
        return None
    if spec.model_type not in FAMILIES:
        return msg("There is no fused ONNX graph for models of type {model_type!r}.", model_type=spec.model_type)
    if spec.head_dim % HEAD_MULTIPLE:
        return msg(
            "Fused attention needs a head size that is a multiple of {multiple}, not {head_dim}.",
            multiple=HEAD_MULTIPLE,
            head_dim=spec.head_dim,
        )
    return None


def impossible(spec: ModelSpec) -> str:
    """Why no graph at all can be written of `spec`; "" if one can."""
    if spec.encoder:
        return ""
    if spec.experts:
        return msg("Which experts compute is decided while a mixture runs, and a graph is fixed before.")
    if not spec.cached or any(cache.has_state or not cache.heads for cache in spec.caches):
        return msg("Some of its layers keep no keys and values, and graphs cache nothing else.")
    return ""


def caution(spec: ModelSpec, precision: str, fused: bool = True) -> str:
    """The quality that `precision` costs, and a better choice; "" if the loss is small."""
    if precision != "int4" or spec.quantization or spec.exported or spec.encoder:
        return ""
    if not fused:
        return msg("4-bit without calibration loses quality: KL 0.22 on the demo model, 0.02 with int8.")
    return msg(
        "4-bit without calibration loses quality: KL 0.22 on the demo model, 0.02 with int8. Quantize with AWQ or GPTQ first and export the result: its weights are used as they are, at about half the loss."
    )


def block_bytes(rows: int, columns: int, bits: int, group: int) -> int:
    return nbits_bytes(rows, columns, bits, columns if group < 0 else group)


def matrix_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer of the blocks."""
    linears = (t.matrices for t in spec.tensors if t.role in ("linear", "experts") and not t.packed_layer)
    shapes = [(outputs, inputs) for count, outputs, inputs in linears for _ in range(count)]
    return shapes + list(spec.packed_layers.values())


def graph_bytes(spec: ModelSpec, precision: str, group_size: int = 32) -> int:
    """Weights of the main graph, as written and as a session packs them."""
    layers = matrix_shapes(spec)
    copies = 1 if spec.tied else 2
    rotary = 4 * spec.context * spec.head_dim
    if precision in ("fp32", "fp16"):
        size = DTYPE_BYTES[precision]
        # A tied embedding is gathered from rows and multiplied by columns.
        return size * (sum(r * c for r, c in layers) + 2 * spec.vocab * spec.hidden) + rotary
    bits, group = (HEAD_BITS, HEAD_GROUP) if precision == "int8" else (4, group_size)
    if spec.stored is not None:
        bits, group = max(4, spec.stored.bits), spec.stored.group_size
    return sum(block_bytes(*shape, bits, group) for shape in layers) + copies * head_bytes(spec) + rotary


def head_bytes(spec: ModelSpec) -> int:
    return block_bytes(spec.vocab, spec.hidden, HEAD_BITS, HEAD_GROUP)


def prefill_bytes(spec: ModelSpec) -> int:
    """Weights of the second graph: a byte each and a scale a row."""
    return sum(rows * columns + 4 * rows for rows, columns in matrix_shapes(spec))


def disk_bytes(spec: ModelSpec, precision: str, group_size: int = 32, fast_prefill: bool | None = None) -> int:
    """Size of an export without tokenizer and configuration; `fast_prefill` as `ExportOptions` decides when None."""
    if fast_prefill is None:
        bits = spec.stored.bits if precision == "stored" and spec.stored else 0
        fast_prefill = precision == "int8" or bits > 4
    return graph_bytes(spec, precision, group_size) + (prefill_bytes(spec) if fast_prefill else 0)


def session_bytes(spec: ModelSpec, precision: str) -> int:
    """Bytes of weights in both sessions once loaded."""
    return spec.size_on_disk if spec.exported else disk_bytes(spec, precision)


def kv_bytes(spec: ModelSpec, context: int, batch: int) -> int:
    """Keys and values in fp32; the graph caches all of them, also those outside a layer's sliding window."""
    return 2 * 4 * spec.layers * spec.kv_heads * spec.head_dim * context * batch


def activation_bytes(spec: ModelSpec, tokens: int, context: int, batch: int, precision: str) -> int:
    """Peak of one block over `tokens` of one row, or one token of each of `batch` rows, that see `context` tokens.

    Counted: residual and normed input; query, key, value and their rotated copies; gate, up and their product;
    the scores of all heads, which exist at once; and in int8 a layer's input divided by its scale, its codes and int32 sums.
    """
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    rows = max(tokens, batch)
    wide = rows * max(3 * (q_width + 2 * kv_width), 4 * spec.intermediate)
    scores = spec.heads * rows * context
    codes = rows * INT8.pass_bytes(spec.intermediate, spec.intermediate) if precision == "int8" and tokens > 1 else 0
    return 4 * (3 * rows * spec.hidden + wide + scores + 2 * batch * spec.vocab) + codes


def writing_bytes(spec: ModelSpec, precision: str, group_size: int = 32, fast_prefill: bool | None = None) -> int:
    """Peak memory of exporting and verifying a fused graph, in addition to the process itself.

    Exporting: the largest matrix in fp32, its codes and the buffers of rounding; layers that share an input are stacked.
    Verifying: first that matrix and the logits of the original, then the logits of both and the session of ONNX Runtime,
    which on a CPU computes fp16 with fp32 copies of the weights, and otherwise dequantizes a matrix at a time to compare it;
    its arena grows for the output head and keeps the smaller buffer of the blocks' matrices.
    """
    head, widest = (
        spec.vocab * spec.hidden,
        max((2 * rows * columns for rows, columns in matrix_shapes(spec)), default=0),
    )
    largest = max(head, widest)
    count, length = parity_windows(spec.vocab, spec.context)
    logits = 4 * count * length * spec.vocab
    logarithms = 5 * 4 * PARITY_ROWS * spec.vocab
    session = disk_bytes(spec, precision, group_size, fast_prefill) * (2 if precision == "fp16" else 1)
    compared = 2 * logits + max(2 * logits, 4 * (head + widest))
    return EXPORTER_BYTES + max(7 * largest + logits, ONNX_RUNTIME_BYTES + session + compared + logarithms)


EXPORTER_BYTES = 36 * MB
"""What exporting adds to the process: its modules, the family's code, an empty model, leftovers of the tokenizer.

Not exact: 63 MB were seen on the demo model before verifying, and part of that is used again while verifying."""


def generic_bytes(spec: ModelSpec, precision: str, group_size: int = 32) -> int:
    """Weights of a generic graph; the embedding, which is gathered, stays in fp32 in int8 and int4 graphs."""
    layers, table = matrix_shapes(spec), spec.vocab * spec.hidden
    head = 0 if spec.encoder else table
    matrices = sum(rows * columns for rows, columns in layers)
    if precision in ("fp32", "fp16"):
        return DTYPE_BYTES[precision] * (matrices + head + table)
    if precision == "int8":
        return matrices + head + 4 * table
    return sum(block_bytes(*shape, 4, group_size) for shape in layers) + (head_bytes(spec) if head else 0) + 4 * table


def tracing_bytes(spec: ModelSpec, precision: str, group_size: int = 32, optimised: bool = False) -> int:
    """Peak memory of exporting and verifying a generic graph, in addition to the process itself; an encoder is traced with its weights."""
    count, length = parity_windows(spec.vocab, spec.context)
    encoder = spec.encoder
    logits = 0 if encoder else 4 * count * length * spec.vocab
    # A CPU computes fp16 graphs in fp32, with a second copy of the weights.
    session = ONNX_RUNTIME_BYTES + generic_bytes(spec, precision, group_size) * (3 if precision == "fp16" else 1)
    whole = generic_bytes(spec, "fp32") if encoder else 0
    if optimised:
        whole = max(whole, ONNX_RUNTIME_BYTES + OPTIMIZER_COPIES * generic_bytes(spec, precision, group_size))
    return TRACER_BYTES + max(
        7 * spec.vocab * spec.hidden, whole, session + 4 * logits + 5 * 4 * PARITY_ROWS * spec.vocab
    )


OPTIMIZER_COPIES = 5
"""Copies of the graph in ONNX Runtime's optimizer, which infers shapes on serialized copies (1.32, measured)."""

TRACER_BYTES = 180 * MB
"""PyTorch's exporter and its representation of a graph (2.13, measured)."""


PARITY_ROWS = 64
"""Rows of logits that the parity check compares at once."""


def parity_windows(vocab: int, context: int) -> tuple[int, int]:
    """(windows, tokens of each) of the text for the parity check of a graph; fewer for large vocabularies."""
    length = min(160, context)
    return max(1, min(3, 192 * MB // (4 * vocab * length))), length


def writing_seconds(spec: ModelSpec, options: ExportOptions, generic: bool = False) -> float:
    """Seconds to export and verify a decoder, at rates that `export.probes` measures by exporting small models.

    Raises:
        Unmeasured: such models were not exported on this machine yet.
    """
    work = export_work(spec, options, generic)
    if spec.encoder or options.format != "onnx":
        raise Unmeasured(work)
    vocabulary = spec.vocab * spec.hidden * (1 if spec.tied else 2)
    amounts = {EXPORTS: 1, BLOCKS: spec.parameters - vocabulary, VOCABULARY: vocabulary}
    seconds = sum(amount / known_rate(f"{part} {work}") for part, amount in amounts.items())
    return seconds * correction(work)


EXPORTS, BLOCKS, VOCABULARY = "exports", "parameters of blocks", "parameters of embeddings"
"""What the time of an export grows with."""


def export_work(spec: ModelSpec, options: ExportOptions, generic: bool = False) -> str:
    """The name of an export among the rates of this machine."""
    how = ["generic" if generic else "fused", *(["optimised"] if generic and options.optimise else [])]
    stored = f", {spec.stored.label}" if spec.stored else ""
    prefill = " and prefill" if options.has_prefill and not generic else ""
    return f"to {options.precision}{prefill}, groups of {options.group_size}{stored}, {', '.join(how)}"


@functools.cache
def runtime_version() -> str:
    """Version of ONNX Runtime, without importing it; "" if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        return ""
