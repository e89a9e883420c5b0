"""Facts about a model before its weights are read: source, shapes, dtypes, sizes.

Pure data and arithmetic, without torch or network; `source.py` reads config.json and the file headers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowmem.models.quantization import Quantization, Shape
from lowmem.units import MB

DTYPE_BYTES = {
    "fp64": 8,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "fp8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
}
"""Bytes per element of unpacked dtypes. For GGUF tensors, whose dtype is a type name such as "q4_1", see `nbytes`."""

CONVERSION_BYTES = 64 * MB
"""Stored bytes that a checkpoint converts to another dtype or layout at a time: what that takes besides the result."""

_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
PACKED_PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_scale",
    ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
"""Suffixes of the tensors that GPTQ and AWQ, compressed-tensors, and bitsandbytes store in place of a weight, or beside
a weight of codes."""

CODE_DTYPES = ("int8", "uint8")

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A stored tensor. `nbytes` is its exact size in the file, for packed GGUF types too."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def is_buffer(self) -> bool:
        """A causal mask or rotary frequencies, which old checkpoints store and every loader recomputes."""
        return self.name.endswith(_BUFFERS)

    @property
    def packed_layer(self) -> str:
        """The layer of which this may be the packed weight, zero points, scales or order, or ""."""
        if self.is_packed_weight:
            return self.name.rpartition(".")[0]
        part = next((part for part in PACKED_PARTS if self.name.endswith(part)), "")
        return self.name.removesuffix(part) if part else ""

    @property
    def is_packed_weight(self) -> bool:
        """Could this be the codes of a layer?"""
        return self.name.endswith(".qweight") or (self.name.endswith(".weight") and self.dtype in CODE_DTYPES)

    @property
    def is_output_embedding(self) -> bool:
        return self.name.endswith(_OUTPUT_EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The immutable checkpoint that a model reference was resolved to.

    A reference is resolved once, when the model is planned. Loading, the graph cache and the quantization journal
    identify the model by `fingerprint`, so a plan made before a download still describes what is loaded after it.

    Args:
        ref: the reference as typed: "demo", a hub id, a folder, a .gguf file.
        name: short display name.
        folder: where the files are; None until they have been fetched.
        revision: commit on the hub, "" for local files.
        fingerprint: hex digest that identifies the content of the files, "" while it is unknown: a model
            described from the catalog is resolved when it is fetched.
        detail: what the weights were converted from, such as "from Q4_1"; "" for an original checkpoint.
        licence, gated: from the hub or the catalog, "" and False when unknown.
    """

    ref: str
    name: str
    folder: Path | None = field(default=None, compare=False)
    revision: str = ""
    fingerprint: str = ""
    detail: str = ""
    licence: str = ""
    gated: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that planning needs to know about a model.

    Args:
        source: the checkpoint it describes.
        model_type: `config.json`'s model_type ("llama", "gpt2", ...).
        tensors: every stored tensor, in file order.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: the shape.
        context: maximum number of positions.
        layer_types: "full" or "sliding" attention for each layer.
        sliding_window: tokens that a sliding layer attends to (0 without such layers).
        tied: input and output embedding share one tensor.
        quantization: quantization method of the checkpoint ("gptq", "awq", ...), or "".
        stored: details of that quantization, None without one.
        size_on_disk: bytes of the weight files.
        has_chat_template: the tokenizer can format a conversation.
        exported: precision of the graph of an exported model, "" for a model with weights.
    """

    source: ModelSource
    model_type: str
    tensors: tuple[Tensor, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    layer_types: tuple[str, ...]
    sliding_window: int = 0
    tied: bool = False
    quantization: str = ""
    stored: Quantization | None = None
    size_on_disk: int = 0
    has_chat_template: bool = False
    exported: str = ""

    @property
    def ref(self) -> str:
        return self.source.ref

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def licence(self) -> str:
        return self.source.licence

    @property
    def gated(self) -> bool:
        return self.source.gated

    @property
    def parameters(self) -> int:
        """Number of parameters, without buffers; a tied embedding counts once even when it is stored twice."""
        packed = self.packed_layers
        counted = (t for t in self.tensors if not (t.is_buffer or (self.tied and t.is_output_embedding)))
        plain = (t for t in counted if t.packed_layer not in packed)
        return sum(tensor.elements for tensor in plain) + sum(rows * columns for rows, columns in packed.values())

    @property
    def packed_layers(self) -> dict[str, Shape]:
        """Name -> (outputs, inputs) of the linear layers that are stored quantized."""
        if self.stored is None or self.stored.refusal():
            return {}
        weights = (t for t in self.tensors if t.is_packed_weight and len(t.shape) == 2)
        return {t.packed_layer: self.stored.linear_shape((t.shape[0], t.shape[1])) for t in weights}

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV cache per token, before any sliding layer is full."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def kv_bytes(self, context: int, batch: int, dtype: str) -> int:
        """Bytes of KV cache for `batch` sequences of `context` tokens; sliding layers hold no more than their window."""
        per_layer_token = 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]
        tokens = sum(min(context, self.sliding_window) if kind == "sliding" else context for kind in self.layer_types)
        return batch * per_layer_token * tokens
