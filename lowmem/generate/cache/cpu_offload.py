"""A KV cache kept in pinned RAM while the model computes on a GPU.

All layers share two GPU buffers: attention reads one of them while the next layer's history is copied into the other on
a separate CUDA stream. New tokens are copied back to RAM alongside the computation. Without a CUDA stream the same steps
run one after another, which is how this is tested without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowmem.generate.cache.full import FullLayer

BUFFERS = 2


class LayerPrefetcher:
    """Two device buffers and the layers that share them, in the order of the forward pass."""

    def __init__(self) -> None:
        self.layers: list[OffloadedLayer] = []
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * BUFFERS
        self._holds: list[OffloadedLayer | None] = [None] * BUFFERS
        self._stream: Any = None

    def fetch(self, layer: OffloadedLayer, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, heads, capacity, head_dim] on the device of `states`, with the past tokens filled in."""
        if layer not in self._holds:
            self._load(layer, states)
        if self._stream is not None:
            torch.cuda.current_stream(states.device).wait_stream(self._stream)
        found = self._buffers[self._holds.index(layer)]
        assert found is not None  # `_load` has made it
        return found

    def prefetch(self, after: OffloadedLayer, states: Tensor) -> None:
        """Start copying the history of the layer after `after`."""
        follower = self.layers[(self.layers.index(after) + 1) % len(self.layers)]
        if follower is not after and follower.is_initialized and follower not in self._holds:
            self._load(follower, states, keep=after)

    def copying(self, device: torch.device) -> AbstractContextManager[Any]:
        """Enter the copy stream, after everything queued on the compute stream so far."""
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self._stream)

    def invalidate(self) -> None:
        """Discard the contents of the device buffers, because the rows have changed."""
        self._holds = [None] * BUFFERS

    def _load(self, layer: OffloadedLayer, states: Tensor, keep: OffloadedLayer | None = None) -> None:
        place = next(index for index, held in enumerate(self._holds) if held is None or held is not keep)
        pair = self._buffers[place]
        if pair is None or pair[0].shape != layer.keys.shape:
            pair = self._buffers[place] = tuple(  # type: ignore[assignment]
                torch.empty(store.shape, dtype=store.dtype, device=states.device)
                for store in (layer.keys, layer.values)
            )
        assert pair is not None
        with self.copying(states.device):
            for target, store in zip(pair, (layer.keys, layer.values), strict=True):
                past = (slice(layer.batch), slice(None), slice(layer.length))
                target[past].copy_(store[past], non_blocking=True)
        self._holds[place] = layer


class OffloadedLayer(FullLayer):
    """Keys and values of every token in (pinned) RAM; a `LayerPrefetcher` copies them to the GPU."""

    def __init__(self, rows: int, capacity: int, prefetcher: LayerPrefetcher) -> None:
        super().__init__(rows, capacity)
        self.prefetcher = prefetcher
        prefetcher.layers.append(self)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the whole history on the GPU; it is valid until the layer after next updates."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.batch != key_states.shape[0]:
            self.prefetcher.invalidate()
        start, end = self._advance(key_states)
        self.length = start  # what is in RAM so far, for the copy
        on_device = self.prefetcher.fetch(self, key_states)
        self.length = end
        new = (slice(self.batch), slice(None), slice(start, end))
        for history, states in zip(on_device, (key_states, value_states), strict=True):
            history[new] = states
        with self.prefetcher.copying(key_states.device):
            for store, states in zip((self.keys, self.values), (key_states, value_states), strict=True):
                store[new].copy_(states, non_blocking=True)
                if self.prefetcher._stream is not None:
                    states.record_stream(self.prefetcher._stream)
        self.prefetcher.prefetch(self, key_states)
        keys, values = (history[: self.batch, :, :end] for history in on_device)
        return keys, values

    def _store(self, states: Tensor) -> Tensor:
        shape = (self.rows, states.shape[1], self.capacity, states.shape[3])
        return torch.empty(shape, dtype=states.dtype, pin_memory=states.device.type == "cuda")

    def reset(self) -> None:
        super().reset()
        self.prefetcher.invalidate()

    def _take(self, rows: Tensor) -> None:
        if self.prefetcher._stream is not None:
            self.prefetcher._stream.synchronize()
        super()._take(rows)
        self.prefetcher.invalidate()
