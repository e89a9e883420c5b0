"""The KV cache: layers that are allocated once, for a known number of rows and tokens.

Layers follow the contract of transformers 5 (`cache_utils.CacheLayerMixin`): `update` gets
the new keys and values [batch, heads, tokens, head_dim], already rotated, and returns the
whole history. Growing by `torch.cat`, as transformers' own layers do, holds a layer twice
while it grows and leaves the allocator with holes; these write in place, so the memory is
2 * layers * kv_heads * head_dim * rows * capacity elements and not a byte more. On a CPU,
pages that were never written cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from lowmem.planning.cache import bits_of

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

    def _store(self, states: Tensor) -> Tensor:
        return states.new_empty(self.rows, states.shape[1], self.capacity, states.shape[3])

    def _stores(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def _take(self, rows: Tensor) -> None:
        """Make row i what `rows[i]` was, in place: the copy in between is half a layer at most."""
        self.batch = len(rows)
        for store in self._stores():
            store[: self.batch, :, : self.length] = store[:, :, : self.length].index_select(0, rows.to(store.device))


def make_cache(
    config: PreTrainedConfig, *, rows: int, capacity: int, kv: str = "same", pads: Sequence[int] = ()
) -> Cache:
    """An empty cache for at most `rows` sequences of `capacity` tokens, its layers of the kinds that `config` names.

    Sliding-window layers stay transformers' own: they hold a window, in the dtype of the
    computation. Memory is taken during the first forward pass.

    Args:
        kv: "same" stores the dtype of the computation, "int8", "int4" and "int2" see `longctx.packed_layer`,
            "ram" see `offload.kv_offload`.
        pads: padding in front of each row, none when left out.

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
    from lowmem.longctx.kv_quant import Unfolded
    from lowmem.longctx.packed_layer import PackedLayer  # which, like the next, builds on the layers here
    from lowmem.offload.kv_offload import RamLayer, Shuttle

    unfolded, shuttle = Unfolded(), Shuttle()

    def layer(kind: str, arguments: dict[str, Any]) -> CacheLayerMixin:
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known is DynamicLayer:
            if kv == "ram":
                return RamLayer(rows, capacity, shuttle)
            if kv == "same":
                return FullLayer(rows, capacity)
            return PackedLayer(rows, capacity, bits_of(kv), pads or (0,) * rows, unfolded)
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
