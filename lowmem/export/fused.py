"""The fused decoder graph of Llama-like models, made of ONNX Runtime's contrib operators.

Attention, rotary embedding and KV cache are one node (GroupQueryAttention), a norm and the addition before it are
another, and layers that share an input are one matrix. The cache is updated in place: passing the same buffer as past
and present avoids a copy. Rows are aligned to the left in it: the tokens of a row are those with an attention mask of 1.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowmem.events import CancelToken, Step
from lowmem.export.graph import Graph
from lowmem.export.linears import Blocks, Linear
from lowmem.export.weights import Matrix, Source
from lowmem.messages import msg
from lowmem.models.blocks import BlockList
from lowmem.planning.exported import FAMILIES, HEAD_MULTIPLE
from lowmem.runtime.onnx.manifest import KEEP

EVERYTHING = 2**31 - 1

_ACTIVATIONS = {"silu": "QuickGelu", "swish": "QuickGelu", "gelu_pytorch_tanh": "FastGelu", "gelu_new": "FastGelu"}
_STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


def refusal(config: Any) -> str | None:
    """Why a model with `config` (of transformers, for the decoder) has no fused graph; None if it has one."""
    if config.model_type not in FAMILIES:
        return msg("There is no fused graph for models of type {model_type!r}.", model_type=config.model_type)
    if _activation(config) not in _ACTIVATIONS:
        return msg("The fused graph does not support the activation {config!r}.", config=_activation(config))
    kinds = {kind for kind in _rope_types(config.rope_parameters or {}) if kind not in _STATIC_ROPE}
    if kinds:
        return msg(
            "Its rotary position embeddings ({kinds}) depend on the length of the text.", kinds=", ".join(sorted(kinds))
        )
    if head_dim(config) % HEAD_MULTIPLE:
        return msg(
            "Fused attention needs a head size that is a multiple of {multiple}, not {head_dim}.",
            multiple=HEAD_MULTIPLE,
            head_dim=head_dim(config),
        )
    return None


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Of all layer types: Gemma 3 has separate parameters for each."""
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return {str(part.get("rope_type", "default")) for part in nested}


@dataclass(frozen=True)
class GraphLayers:
    """How the parts of a graph are computed.

    Args:
        block: the linear layers of the blocks.
        head: the output head; None for a graph without one, which only fills the cache.
        embedding: block-quantized embedding; None stores it as `dtype`. A tied head in `Blocks` shares its codes.
        dtype: activations, norms and cache.
    """

    block: Linear
    head: Linear | None
    embedding: Blocks | None = None
    dtype: type = np.float32


class FusedDecoder:
    """Writes the graph of `model` (empty, of transformers) with the weights of `source`.

    Inputs: input_ids [batch, new], attention_mask [batch, all], position_ids [batch, new] (int64), and for every layer
    past_key_values.N.key and .value [batch, heads, past, head_dim]; optionally `KEEP`. Outputs: logits [batch, new, vocabulary] and
    present.N.key and .value.
    """

    def __init__(self, model: Any, blocks: BlockList, source: Source, graph: Graph, layers: GraphLayers) -> None:
        self.config = model.config.get_text_config(decoder=True)
        self._model, self._blocks, self._source, self._graph, self._layers = model, blocks, source, graph, layers
        self._heads = self.config.num_attention_heads
        self._kv_heads = self.config.num_key_value_heads
        self._head_dim = head_dim(self.config)
        self._window = getattr(self.config, "sliding_window", None)
        self._decoder = blocks.path.rpartition(".")[0]
        self._tied = bool(self.config.tie_word_embeddings)

    def write(self, window_types: tuple[str, ...], cancel: CancelToken) -> Iterator[Step]:
        """All nodes, block by block. `window_types`: per layer "full" or "sliding"."""
        total = len(self._blocks) + 1
        yield Step(0, total, msg("Writing the graph"), "blocks")
        self._inputs()
        embedded = self._embedding()
        residual, branch = embedded, ""
        for index, kind in enumerate(window_types):
            cancel.check()
            residual, branch = self._block(index, kind, residual, branch)
            yield Step(
                index + 1,
                total,
                msg("Writing block {index} of {count}", index=index + 1, count=len(self._blocks)),
                "blocks",
            )
        if self._layers.head is not None:
            hidden, _ = self._norm(f"{self._decoder}.norm", residual, branch)
            self._head(hidden)
        yield Step(total, total, msg("Writing the graph"), "blocks")

    def _inputs(self) -> None:
        graph = self._graph
        graph.input("input_ids", np.int64, ("batch", "new"))
        mask = graph.input("attention_mask", np.int64, ("batch", "all"))
        graph.input("position_ids", np.int64, ("batch", "new"))
        counts = graph.add("ReduceSum", (mask, graph.constant([1])), keepdims=0)
        last = graph.add("Sub", (counts, graph.constant([1])))
        self._lengths = graph.add("Cast", (last,), to=6)
        every = graph.add("Gather", (graph.add("Shape", (mask,)), graph.constant(1)))
        self._total = graph.add("Cast", (every,), to=6)

    def _embedding(self) -> str:
        graph, layers = self._graph, self._layers
        weight = f"{self._decoder}.embed_tokens.weight"
        if layers.embedding is not None:
            rows = layers.embedding.gather(graph, "input_ids", self._embedding_matrix())
        else:
            if not graph.known(weight):
                graph.weight(weight, self._source.tensor(weight).numpy().astype(layers.dtype))
            rows = graph.add("Gather", (weight, "input_ids"))
        if self.config.model_type.startswith("gemma"):
            rows = graph.add("Mul", (rows, graph.constant(self.config.hidden_size**0.5, layers.dtype)))
        return rows

    def _embedding_matrix(self) -> Matrix:
        """Has the name of the head if they are tied, so that its codes are written once. Not cached: it is the largest matrix."""
        name = "lm_head" if self._tied else "embed_tokens"
        return Matrix(name, self._source.tensor(f"{self._decoder}.embed_tokens.weight"))

    def _head(self, hidden: str) -> None:
        assert self._layers.head is not None  # the caller has looked
        graph = self._graph
        matrix = self._embedding_matrix() if self._tied else self._source.matrix("lm_head")
        # Logits of a whole prompt, of which only the last row is needed, would take more memory and time than a block.
        keep = graph.optional_input(KEEP, np.array([EVERYTHING]))
        end = graph.constant([EVERYTHING])
        rows = graph.add("Slice", (hidden, graph.add("Neg", (keep,)), end, graph.constant([1])))
        logits = self._layers.head(graph, rows, matrix)
        capped = getattr(self.config, "final_logit_softcapping", None)
        if capped:
            cap = graph.constant(capped, self._layers.dtype)
            logits = graph.add("Mul", (graph.add("Tanh", (graph.add("Div", (logits, cap)),)), cap))
        if self._layers.dtype is not np.float32:
            logits = graph.add("Cast", (logits,), to=1)
        graph.add("Identity", (logits,), "logits")
        graph.output("logits", np.float32, ("batch", "kept", self.config.vocab_size))

    def _block(self, index: int, kind: str, residual: str, branch: str) -> tuple[str, str]:
        """One block on `residual` + `branch` ("" before the first); returns both again, not yet added."""
        prefix = f"{self._blocks.path}.{index}"
        qkv, output, up, down = self._blocks[index].stages
        x, residual = self._norm(f"{prefix}.input_layernorm", residual, branch)
        branch = self._linear(prefix, output.linears, self._attention(prefix, qkv.linears, index, kind, x))[0]
        after = "post_attention_layernorm"
        sandwiched = self._source.has(f"{prefix}.pre_feedforward_layernorm.weight")
        if sandwiched:  # Gemma 2 and 3 also norm what a branch adds
            branch = self._norm(f"{prefix}.post_attention_layernorm", branch)[0]
            after = "pre_feedforward_layernorm"
        x, residual = self._norm(f"{prefix}.{after}", residual, branch)
        branch = self._linear(prefix, down.linears, self._gated(prefix, up.linears, x))[0]
        if sandwiched:
            branch = self._norm(f"{prefix}.post_feedforward_layernorm", branch)[0]
        return residual, branch

    def _linear(self, prefix: str, names: tuple[str, ...], x: str) -> list[str]:
        layers = [f"{prefix}.{name}" for name in names]
        return [self._layers.block(self._graph, x, matrix) for matrix in self._source.matrices(layers)]

    def _norm(self, name: str, residual: str, branch: str = "") -> tuple[str, str]:
        """The norm of `residual` + `branch`, and that sum."""
        graph, weight = self._graph, f"{name}.weight"
        if not graph.known(weight):
            values = self._source.tensor(weight)
            if self.config.model_type.startswith("gemma"):  # whose norms add 1 to what is stored
                values.add_(1)
            graph.weight(weight, values.numpy().astype(self._layers.dtype))
        if not branch:
            return self._rms_norm(residual, weight), residual
        total = f"{name}.sum"
        normed = graph.contrib(
            "SkipSimplifiedLayerNormalization",
            (branch, residual, weight),
            (f"{name}.out", "", "", total),
            epsilon=self.config.rms_norm_eps,
        )
        return normed, total

    def _rms_norm(self, x: str, weight: str) -> str:
        return self._graph.add(
            "SimplifiedLayerNormalization", (x, weight), axis=-1, epsilon=self.config.rms_norm_eps, stash_type=1
        )

    def _attention(self, prefix: str, names: tuple[str, ...], index: int, kind: str, x: str) -> str:
        graph, config = self._graph, self.config
        cache = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        present = tuple(f"present.{index}.{part}" for part in ("key", "value"))
        for name in cache:
            graph.input(name, self._layers.dtype, ("batch", self._kv_heads, "past", self._head_dim))
        for name in present:
            graph.output(name, self._layers.dtype, ("batch", self._kv_heads, "present", self._head_dim))
        capped = getattr(config, "attn_logit_softcapping", None)
        scale = getattr(config, "query_pre_attn_scalar", None) or self._head_dim
        return graph.contrib(
            "GroupQueryAttention",
            (*self._qkv(prefix, names, x), *cache, self._lengths, self._total, *self._rotary(index), "position_ids"),
            (f"{prefix}.attention", *present),
            num_heads=self._heads,
            kv_num_heads=self._kv_heads,
            scale=float(scale**-0.5),
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=int(self._window) if kind == "sliding" and self._window else -1,
            softcap=float(capped or 0.0),
        )

    def _qkv(self, prefix: str, names: tuple[str, ...], x: str) -> tuple[str, str, str]:
        """Query, key and value; the last two are "" if the first holds all three."""
        parts = self._linear(prefix, names, x)
        normed = self._source.has(f"{prefix}.self_attn.q_norm.weight")
        if len(parts) == 1:
            if not normed:
                return parts[0], "", ""
            widths = [heads * self._head_dim for heads in (self._heads, self._kv_heads, self._kv_heads)]
            parts = self._split(parts[0], widths, [f"{prefix}.{part}" for part in "qkv"])
        query, key, value = parts
        if normed:
            query = self._head_norm(f"{prefix}.self_attn.q_norm", query, self._heads)
            key = self._head_norm(f"{prefix}.self_attn.k_norm", key, self._kv_heads)
        return query, key, value

    def _head_norm(self, name: str, x: str, heads: int) -> str:
        """Normalize each head separately (Qwen 3, Gemma 3)."""
        graph = self._graph
        apart = graph.add("Reshape", (x, graph.constant([0, 0, heads, self._head_dim])))
        normed, _ = self._norm(name, apart)
        return graph.add("Reshape", (normed, graph.constant([0, 0, heads * self._head_dim])))

    def _rotary(self, index: int) -> tuple[str, str]:
        """Names of the tables [context, rotated channels / 2] of cosines and sines of a layer."""
        types = getattr(self.config, "layer_types", None) or [""]
        kind = types[index] if _is_nested(self.config.rope_parameters or {}) else ""
        names = f"rotary{kind and '.' + kind}.cos", f"rotary{kind and '.' + kind}.sin"
        known = [self._graph.known(name) for name in names]
        if not all(known):
            for name, table in zip(names, self._tables(kind), strict=True):
                self._graph.weight(name, table.numpy().astype(self._layers.dtype), inline=False)
        return names

    def _tables(self, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Computed by the model's own code, which implements every kind of scaling."""
        positions = torch.arange(self.config.max_position_embeddings)[None]
        arguments = (kind,) if kind else ()
        cos, sin = self._model.base_model.rotary_emb(torch.zeros(1), positions, *arguments)
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _gated(self, prefix: str, names: tuple[str, ...], x: str) -> str:
        """activation(gate) * up."""
        graph = self._graph
        parts = self._linear(prefix, names, x)
        if len(parts) == 1:
            width = self.config.intermediate_size
            parts = self._split(parts[0], [width, width], [f"{prefix}.gate", f"{prefix}.up"])
        operator = _ACTIVATIONS[_activation(self.config)]
        attributes: dict[str, Any] = {"alpha": 1.0} if operator == "QuickGelu" else {}
        return graph.add("Mul", (graph.contrib(operator, (parts[0],), **attributes), parts[1]))

    def _split(self, x: str, widths: Sequence[int], names: Sequence[str]) -> list[str]:
        self._graph.add("Split", (x, self._graph.constant(widths)), tuple(names), axis=-1)
        return list(names)


def _is_nested(parameters: dict[str, Any]) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())
