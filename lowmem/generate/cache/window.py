"""A KV cache of constant size: the first few tokens (attention sinks) and a window of the latest tokens.

This is StreamingLLM (arXiv 2309.17453). A model's perplexity collapses as soon as its first tokens leave the window;
with a few of them cached, generation stays stable without limit, although everything between sinks and window is lost.
As in the paper, the sinks are positioned right before the window, so distances never exceed those seen in training.
The paper rotates all keys again for every token; here only the sinks are rotated, from copies of their original keys.
Attention does not depend on the order of the keys, so a new token overwrites the oldest one in place.

Position ids stay below the model's limit: when they reach it, the whole window is rotated back to the beginning, once in
thousands of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from lowmem.generate.cache.ring import Ring, Stream
from lowmem.generate.cache.rotary import Rotation
from lowmem.generate.cache.storage import new_store


class WindowLayer(CacheLayerMixin):
    """One layer's sinks and window.

    Holds 2 * rows * heads * (sinks + window) * head_dim elements, and the sinks' original keys in fp32, twice.

    Args:
        rows: the most sequences the layer will hold at once.
        native: whether this is a sliding-window layer of the model itself.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, ring: Ring, rows: int, rotation: Rotation, native: bool = False) -> None:
        super().__init__()
        self.ring, self.rows, self.rotation, self.is_sliding = ring, rows, rotation, native
        self.first = self.last = False
        self.batch = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, slots, sinks = key_states.shape[1], self.ring.slots, self.ring.sinks
        # Zeros, because a masked slot still contributes its value times 0, which must not be NaN.
        self.keys = new_store(key_states, (self.rows, heads, slots, key_states.shape[-1]))
        self.values = new_store(value_states, (self.rows, heads, slots, value_states.shape[-1]))
        self.first_keys = torch.zeros(
            self.rows, heads, sinks, key_states.shape[-1], device=key_states.device, dtype=torch.float32
        )
        self.swapped_keys = torch.zeros_like(self.first_keys)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the new tokens and return the keys and values they attend to, [batch, heads, keys, head_dim].

        Their order is the one that `Ring.mask` describes.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stream = self.ring.stream
        if self.first and not stream.tokens:
            stream.begin(key_states.shape[2])
        self.batch = key_states.shape[0]
        if stream.shifts is not None:
            self._move_back(stream.shifts)
        if self.ring.appends:
            seen = self._append(key_states, value_states)
        elif stream.in_chunk:
            seen = self._chunk(key_states, value_states)
        else:
            seen = self._overwrite(key_states, value_states)
        if self.last:
            stream.end()
        return seen

    def _move_back(self, shifts: Tensor) -> None:
        self.rotation.rotate_in_place(self.keys[: self.batch, :, self.ring.sinks :], -shifts)

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        start = self.ring.stream.seen[0]
        end = start + keys.shape[2]
        self.keys[: self.batch, :, start:end] = keys
        self.values[: self.batch, :, start:end] = values
        if start < self.ring.sinks:
            self._save_sinks(slice(0, self.batch), slice(start, min(end, self.ring.sinks)))
        return self.keys[: self.batch, :, :end], self.values[: self.batch, :, :end]

    def _overwrite(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        stream, all_keys, all_values = self.ring.stream, self.keys[: self.batch], self.values[: self.batch]
        if stream.aligned:
            slot = self.ring.slot(stream.seen[0])
            all_keys[:, :, slot], all_values[:, :, slot] = keys[:, :, 0], values[:, :, 0]
        else:
            self._write(keys, values)
        if self.ring.sinks:
            all_keys[:, :, : self.ring.sinks] = self._rotated_sinks()
        return all_keys, all_values

    def _chunk(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        sinks, tokens = self.ring.sinks, keys.shape[2]
        parts = [(self.keys[: self.batch, :, sinks:], self.values[: self.batch, :, sinks:]), (keys, values)]
        if sinks:
            parts.insert(0, self._sink_copies(keys.dtype, tokens, self.values[: self.batch, :, :sinks]))
        seen = torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)
        self._write(keys, values)
        return seen

    def _rotated_sinks(self) -> Tensor:
        """The sinks' keys, positioned for the single token of this pass, fp32 [batch, heads, sinks, head_dim]."""
        cos, sin = (factor[:, :, 0] for factor in self.ring.sink_factors(self.rotation, self.first_keys.device))
        return (self.first_keys[: self.batch] * cos).addcmul_(self.swapped_keys[: self.batch], sin)

    def _sink_copies(self, dtype: torch.dtype, tokens: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of the sinks for each token of this pass, positioned for it, [batch, heads, tokens * sinks, head_dim]."""
        cos, sin = self.ring.sink_factors(self.rotation, self.first_keys.device)
        rotated = self.first_keys[: self.batch, :, None] * cos + self.swapped_keys[: self.batch, :, None] * sin
        return rotated.to(dtype).flatten(2, 3), values[:, :, None].expand(-1, -1, tokens, -1, -1).flatten(2, 3)

    def _write(self, keys: Tensor, values: Tensor) -> None:
        writes = self.ring.writes(keys.device)
        rows, tokens, slots = writes.every
        self.keys[rows, :, slots] = keys[rows, :, tokens]
        self.values[rows, :, slots] = values[rows, :, tokens]
        if writes.sinks.numel():
            self._save_sinks(writes.sinks[0], writes.sinks[2])

    def _save_sinks(self, rows: Any, slots: Any) -> None:
        keys = self.keys[rows, :, slots].float()
        self.first_keys[rows, :, slots], self.swapped_keys[rows, :, slots] = keys, self.rotation.swap_pairs(keys)

    def get_seq_length(self) -> int:
        """The position of the next token."""
        return max(seen - base for seen, base in zip(self.ring.stream.seen, self.ring.stream.base, strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        keys = min(self.ring.stream.seen[0] + query_length, self.ring.slots)
        return keys, self.get_seq_length() + query_length - keys

    def get_max_length(self) -> int:
        return -1

    def _stores(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.first_keys, self.swapped_keys

    def batch_select_indices(self, rows: Tensor) -> None:
        """Make row i what `rows[i]` was."""
        self.batch = len(rows)
        for store in self._stores() if self.is_initialized else ():
            store[: self.batch] = store.index_select(0, rows.to(store.device))


class WindowCache(Cache):
    """The cache of a model whose layers with keys and values are all `WindowLayer`s; made by `policy.make_cache`."""

    def __init__(self, stream: Stream, layers: list[Any], kinds: Sequence[str], eager: bool) -> None:
        super().__init__(layers=list(layers))
        self.stream = stream
        attentions = [(kind, getattr(layer, "attention", layer)) for kind, layer in zip(kinds, layers, strict=True)]
        windows = [(kind, layer) for kind, layer in attentions if isinstance(layer, WindowLayer)]
        windows[0][1].first = windows[-1][1].last = True
        self._rings = {kind: layer.ring for kind, layer in windows}
        self._states, self._eager = any(not isinstance(layer, WindowLayer) for layer in layers), eager

    def parts(self, tokens: int, chunk: int) -> Iterator[int]:
        """Split the next `tokens` into passes of at most `chunk`."""
        while tokens:
            part = self.stream.most_tokens(min(chunk, tokens))
            yield part
            tokens -= part

    def inputs(self, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Begin a pass over `tokens` tokens; returns the model inputs for masks and position ids."""
        self.stream.begin(tokens)
        inputs: dict[str, Any] = {}
        if self._states or not self.stream.aligned:  # some families count tokens by their first layer
            inputs["position_ids"] = self.stream.positions().to(device)
        masks = {kind: self._shaped(ring.mask(), device, dtype) for kind, ring in self._rings.items()}
        if any(mask is not None for mask in masks.values()):
            inputs["attention_mask"] = masks if len(masks) > 1 else next(iter(masks.values()))
        return inputs

    def _shaped(self, mask: Tensor | None, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        if mask is None or not self._eager:
            return mask if mask is None else mask.to(device)
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min).to(device)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.stream.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.batch_select_indices(indices)  # type: ignore[union-attr]  # every kind of layer has it
        self.stream.select(indices.tolist())
