"""Facts about a model before its weights are read: source, shapes, dtypes, sizes.

Pure data and arithmetic, without torch or network; `source.py` reads config.json and the file headers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lowmem.messages import msg
from lowmem.models.anatomy import Activations, LayerCache
from lowmem.models.blocks import BlockList
from lowmem.models.quantization import Quantization, Shape
from lowmem.models.tensors import CODE_DTYPES, CONVERSION_BYTES, DTYPE_BYTES, PACKED_PARTS, Tensor, conversion_bytes

__all__ = [
    "CODE_DTYPES",
    "CONVERSION_BYTES",
    "DTYPE_BYTES",
    "PACKED_PARTS",
    "ModelSource",
    "ModelSpec",
    "Tensor",
    "conversion_bytes",
]


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
        verified: False for a description that has not been compared with the model's files.
    """

    ref: str
    name: str
    folder: Path | None = field(default=None, compare=False)
    revision: str = ""
    fingerprint: str = ""
    detail: str = ""
    licence: str = ""
    gated: bool = False
    verified: bool = True

    @property
    def caution(self) -> str:
        """That the files may differ from the description, "" when it is verified."""
        return "" if self.verified else msg("From public sources, not yet checked against the hub's files.")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that planning needs to know about a model.

    Args:
        source: the checkpoint it describes.
        model_type: `config.json`'s model_type ("llama", "gpt2", ...).
        tensors: everything that is loaded, under the names of the model's parameters; a tied head is not among them.
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: the shape.
        context: maximum number of positions.
        caches: what each layer keeps of a sequence.
        activations: memory of a forward pass, by dtype ("fp32", "half").
        blocks: the stages of its blocks.
        cached: the model computes with a cache that is given to it.
        encoder: reads text but generates none.
        experts, experts_per_token: of a mixture, in each of its layers; 0 without.
        tied: input and output embedding share one tensor.
        quantization: quantization method of the checkpoint ("gptq", "awq", ...), or "".
        stored: details of that quantization, None without one.
        dequantized: what weights are stored as that are dequantized when they are read, such as "FP8"; "" for none.
        size_on_disk: bytes of the weight files.
        has_chat_template: the tokenizer can format a conversation.
        exported: precision of the graph of an exported model, "" for a model with weights.
        sampling: (name, value) of the numbers in its generation_config.json: its own defaults for sampling options.
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
    caches: tuple[LayerCache, ...] = ()
    activations: tuple[tuple[str, Activations], ...] = ()
    blocks: BlockList = BlockList()  # noqa: RUF009  immutable
    cached: bool = True
    encoder: bool = False
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False
    quantization: str = ""
    stored: Quantization | None = None
    dequantized: str = ""
    size_on_disk: int = 0
    has_chat_template: bool = False
    exported: str = ""
    sampling: tuple[tuple[str, float], ...] = ()

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
        """Number of parameters; a tied embedding counts once."""
        packed = self.packed_layers
        plain = (tensor for tensor in self.tensors if tensor.packed_layer not in packed)
        return sum(tensor.elements for tensor in plain) + sum(rows * columns for rows, columns in packed.values())

    @property
    def packed_layers(self) -> dict[str, Shape]:
        """Name -> (outputs, inputs) of the linear layers that are stored quantized."""
        if self.stored is None or self.stored.refusal():
            return {}
        weights = (t for t in self.tensors if t.is_packed_weight and len(t.shape) == 2)
        return {t.packed_layer: self.stored.at(t.packing).linear_shape((t.shape[0], t.shape[1])) for t in weights}

    @property
    def packings(self) -> set[Quantization]:
        """How the packed layers are stored: one way, or several where layers have bits and groups of their own."""
        stored = self.stored
        return {stored.at(t.packing) for t in self.tensors if t.is_packed_weight} if stored is not None else set()

    @property
    def layer_types(self) -> tuple[str, ...]:
        """What each layer attends to: "full", "sliding", "state" or "none"."""
        return tuple(cache.kind for cache in self.caches)

    @property
    def sliding_window(self) -> int:
        """The largest window of a sliding layer, 0 without such layers."""
        return max((cache.window for cache in self.caches), default=0)

    def activation_bytes(self, tokens: int, context: int, batch: int, dtype: str) -> int:
        """Most bytes alive at once in a forward pass, without weights, caches and logits; see `Activations`."""
        return dict(self.activations)["fp32" if dtype == "fp32" else "half"].bytes(tokens, context, batch)

    def kv_bytes_per_token(self, dtype: str) -> int:
        """Bytes of KV cache per token, before any sliding layer is full."""
        return sum(cache.numbers for cache in self.caches) * DTYPE_BYTES[dtype]

    def kv_bytes(self, context: int, batch: int, dtype: str) -> int:
        """Bytes of the cache for `batch` sequences of `context` tokens; sliding layers hold no more than their window."""
        return batch * sum(
            cache.numbers * min(context, cache.window or context) * DTYPE_BYTES[dtype] + cache.fixed_bytes(dtype)
            for cache in self.caches
        )
