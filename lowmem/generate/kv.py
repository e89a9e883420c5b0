"""The KV cache: layers that are allocated once, for a known number of rows and tokens.

Layers follow the contract of transformers 5 (`cache_utils.CacheLayerMixin`): `update` gets
the new keys and values [batch, heads, tokens, head_dim], already rotated, and returns the
whole history. Growing by `torch.cat`, as transformers' own layers do, holds a layer twice
while it grows and leaves the allocator with holes; these write in place, so the memory is
2 * layers * kv_heads * head_dim * rows * capacity elements and not a byte more. On a CPU,
pages that were never written cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, cache_utils
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from lowmem.errors import Unsupported

# A layer that reads another's keys; transformers 5.15, which Colab brings, counts such layers out instead.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)


class FullLayer(CacheLayerMixin):
    """Keys and values of every token, in the dtype of the computation.

    Args:
        rows: most sequences the layer will ever hold at once.
        capacity: most tokens of one sequence.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity
        self.batch = self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._store(key_states)
        self.values = self._store(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return views [batch, heads, all tokens, head_dim] of the whole history."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self._advance(key_states)
        keys = self.keys[: self.batch, :, : self.length]
        values = self.values[: self.batch, :, : self.length]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.batch = self.length = 0

    def crop(self, max_length: int) -> None:
        """Forget the tokens after the first `max_length`."""
        self.length = min(self.length, max_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def _advance(self, states: Tensor) -> tuple[int, int]:
        self.batch = states.shape[0]
        return self.length, self.length + states.shape[2]

    def _store(self, states: Tensor, width: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        heads, head_dim = states.shape[1], states.shape[3]
        return torch.empty(
            self.rows, heads, self.capacity, width or head_dim, dtype=dtype or states.dtype, device=states.device
        )

    def _stores(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def _take(self, rows: Tensor) -> None:
        """Make row i what `rows[i]` was, in place: the copy in between is half a layer at most."""
        self.batch = len(rows)
        for store in self._stores():
            store[: self.batch, :, : self.length] = store[:, :, : self.length].index_select(0, rows.to(store.device))


class Scratch:
    """One pair of buffers in which the layers of a cache unfold their history, each in its turn."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def buffer(self, name: str, layer: FullLayer, states: Tensor) -> Tensor:
        """[rows, heads, capacity, head_dim] in the dtype and on the device of `states`."""
        key = (name, *states.shape[1::2], states.dtype, states.device)
        if key not in self._buffers:
            self._buffers[key] = layer._store(states)
        return self._buffers[key]


class Int8Layer(FullLayer):
    """Keys and values in int8, symmetric, with one fp16 scale per token and head.

    A token costs kv_heads * (head_dim + 2) bytes for keys and again for values. Attention
    wants the computation's dtype, so every pass unfolds the layer's history into `scratch`:
    the memory of one layer's full-size keys and values, shared by all layers. The tokens of
    the present pass are attended to exactly; they are rounded for later ones.
    """

    def __init__(self, rows: int, capacity: int, scratch: Scratch) -> None:
        super().__init__(rows, capacity)
        self.scratch = scratch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._store(states, dtype=torch.int8) for states in (key_states, value_states))
        self.key_scales, self.value_scales = (
            self._store(states, 1, torch.float16) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the unfolded history, valid until the next layer's update."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._advance(key_states)
        keys = self._append(
            key_states, self.keys, self.key_scales, start, self.scratch.buffer("keys", self, key_states)
        )
        values = self._append(
            value_states, self.values, self.value_scales, start, self.scratch.buffer("values", self, value_states)
        )
        self.length = end
        return keys, values

    def _append(self, states: Tensor, codes: Tensor, scales: Tensor, start: int, unfolded: Tensor) -> Tensor:
        end = start + states.shape[2]
        history = unfolded[: self.batch, :, :end]
        past = history[:, :, :start]
        past.copy_(codes[: self.batch, :, :start]).mul_(scales[: self.batch, :, :start])
        history[:, :, start:] = states
        codes[: self.batch, :, start:end], scales[: self.batch, :, start:end] = quantize(states)
        return history

    def _stores(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values, self.key_scales, self.value_scales) if self.is_initialized else ()


def quantize(states: Tensor) -> tuple[Tensor, Tensor]:
    """[..., head_dim] -> (int8 codes [..., head_dim], fp16 scales [..., 1]) with states ~ scale * code."""
    scales = (states.abs().amax(dim=-1, keepdim=True).float() / 127).half().clamp_(min=torch.finfo(torch.float16).tiny)
    codes = (states.float() / scales).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def make_cache(config: PreTrainedConfig, *, rows: int, capacity: int, kv: str = "same") -> Cache:
    """An empty cache for at most `rows` sequences of `capacity` tokens, its layers of the kinds that `config` names.

    Sliding-window layers stay transformers' own: they hold a window, in the dtype of the
    computation. Memory is taken during the first forward pass.

    Args:
        kv: "same" stores the dtype of the computation, "int8" see `Int8Layer`, "ram" see `offload.kv_offload`.

    Raises:
        Unsupported: the model remembers something else than keys and values.
    """
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise _unsupported(config)
    sharing = any(getattr(decoder, "kv_sharing_modes", None) or ()) or getattr(decoder, "num_kv_shared_layers", None)
    if kv != "same" and sharing:
        # A layer that reads another's keys would find the shared buffer overwritten.
        raise Unsupported(
            f"Layers of {config.model_type!r} share keys and values, which the {kv} cache cannot serve.",
            "Store the KV cache in the same precision as the computation.",
        )
    from lowmem.offload.kv_offload import RamLayer, Shuttle  # whose layers build on those here

    scratch, shuttle = Scratch(), Shuttle()

    def layer(kind: str, arguments: dict[str, Any]) -> CacheLayerMixin:
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known is DynamicLayer:
            if kv == "ram":
                return RamLayer(rows, capacity, shuttle)
            return Int8Layer(rows, capacity, scratch) if kv == "int8" else FullLayer(rows, capacity)
        if known in (DynamicSlidingWindowLayer, DummyLayer) and known is not None:
            return known(**arguments)
        raise _unsupported(config)

    return Cache(layers=[layer(*described) for described in layer_kinds(decoder)])


def layer_kinds(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """What each layer remembers in transformers' words ("sliding_attention"), and its layer's arguments."""
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    if isinstance(arguments, dict):  # the same for all layers, until transformers 5.15
        return [(kind, arguments) for kind in kinds]
    return list(zip(kinds, arguments, strict=True))


def check_supported(model: Any) -> None:
    """Raise `Unsupported` for a model whose memory is a state and not keys and values."""
    if getattr(model, "_is_stateful", False):
        raise _unsupported(model.config)


def _unsupported(config: Any) -> Unsupported:
    return Unsupported(
        f"Models of the kind {config.model_type!r} remember more than keys and values, which this cache cannot hold.",
        "Switch the KV cache off (slow), or choose another model.",
    )
