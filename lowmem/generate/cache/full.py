"""A KV cache layer that is allocated once, for a known number of rows and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin

from lowmem.generate.cache.storage import new_store

# The cache layer of a layer without a cache. transformers 5.15, which Colab has, omits such layers instead.
DummyLayer: Any = getattr(cache_utils, "DummyLayer", None)


class FullLayer(CacheLayerMixin):
    """Keys and values of every token, in the dtype of the computation.

    Args:
        rows: the most sequences the layer will hold at once.
        capacity: the most tokens of one sequence.
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
        """Drop all tokens after the first `max_length`."""
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
        return new_store(states, (self.rows, states.shape[1], self.capacity, states.shape[3]))

    def _stores(self) -> tuple[Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def _take(self, rows: Tensor) -> None:
        """Make row i what `rows[i]` was, in place; the temporary copy is at most half a layer."""
        self.batch = len(rows)
        for store in self._stores():
            store[: self.batch, :, : self.length] = store[:, :, : self.length].index_select(0, rows.to(store.device))
