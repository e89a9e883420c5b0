"""A model before any weight is read: shapes, dtypes and bytes, from config.json and file headers.

Pure data and arithmetic; no torch, no network. `source.py` reads the files.
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
"""Bytes per element of unpacked dtypes. GGUF tensors keep their type's name ("q4_1"); ask their `nbytes`."""

CONVERSION_BYTES = 64 * MB
"""Stored bytes that a checkpoint converts to another dtype or layout at a time: what that takes besides the result."""

_OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
PACKED_PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_scale",
    ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
"""What GPTQ and AWQ, compressed-tensors, and bitsandbytes store in place of a weight, or beside one of codes."""

CODE_DTYPES = ("int8", "uint8")

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor. `nbytes` is what the file holds, exact even for packed GGUF types."""

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
        """Stored by old checkpoints (causal masks, rotary frequencies), recomputed by every loader."""
        return self.name.endswith(_BUFFERS)

    @property
    def packed_layer(self) -> str:
        """The layer whose packed weight, zero points, scales or order this may be, or ""."""
        if self.is_packed_weight:
            return self.name.rpartition(".")[0]
        part = next((part for part in PACKED_PARTS if self.name.endswith(part)), "")
        return self.name.removesuffix(part) if part else ""

    @property
    def is_packed_weight(self) -> bool:
        """May these be a layer's codes?"""
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
        context: positions the model was made for.
        layer_types: per layer "full" or "sliding".
        sliding_window: tokens a sliding layer remembers (0 without such layers).
        tied: input and output embedding are one tensor.
        quantization: the checkpoint's own quantization method ("gptq", "awq", ...), or "".
        stored: the details of that quantization, None without one.
        size_on_disk: bytes of the weight files.
        has_chat_template: the tokenizer knows how to format a conversation.
        exported: the precision of the graph that is all there is of the model, "" where there are weights.
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
        """Parameters, without stored buffers; a tied embedding counts once even where the file holds it twice."""
        packed = self.packed_layers
        counted = (t for t in self.tensors if not (t.is_buffer or (self.tied and t.is_output_embedding)))
        plain = (t for t in counted if t.packed_layer not in packed)
        return sum(tensor.elements for tensor in plain) + sum(rows * columns for rows, columns in packed.values())

    @property
    def packed_layers(self) -> dict[str, Shape]:
        """Name -> (outputs, inputs) of the linear layers that the files hold quantized."""
        if self.stored is None or self.stored.refusal():
            return {}
        weights = (t for t in self.tensors if t.is_packed_weight and len(t.shape) == 2)
        return {t.packed_layer: self.stored.linear_shape((t.shape[0], t.shape[1])) for t in weights}

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV cache bytes that one more token costs while every layer still grows."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def kv_bytes(self, context: int, batch: int, dtype: str) -> int:
        """KV cache bytes of `batch` sequences of `context` tokens; sliding layers stop growing."""
        per_layer_token = 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]
        tokens = sum(min(context, self.sliding_window) if kind == "sliding" else context for kind in self.layer_types)
        return batch * per_layer_token * tokens
