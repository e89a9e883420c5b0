"""A full-length KV cache layer in 8, 4 or 2 bits.

Every token has the same column as in a `FullLayer`, so the model's own masks and positions apply. Each full block of
tokens is quantized once (see `block`); the latest tokens and the first few of each row stay exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lowmem.generate.cache.block import DequantizeBuffers, PackedBlocks
from lowmem.generate.cache.full import FullLayer
from lowmem.generate.cache.storage import new_store
from lowmem.planning.cache import BLOCK, EXACT_FIRST, blocks_of


class PackedLayer(FullLayer):
    """Keys quantized per channel over `BLOCK` tokens, values per token.

    Args:
        rows: the most sequences the layer will hold at once.
        capacity: the most tokens of one sequence.
        bits: 8, 4 or 2.
        pads: padding tokens in front of each row.
        buffers: scratch memory shared by all layers.
    """

    def __init__(self, rows: int, capacity: int, bits: int, pads: Sequence[int], buffers: DequantizeBuffers) -> None:
        super().__init__(rows, capacity)
        self.bits, self.pads, self.buffers = bits, list(pads), buffers
        self._sides: tuple[_Side, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        blocks = blocks_of(self.capacity, False)
        self._sides = tuple(
            _Side(PackedBlocks(self.rows, blocks, self.bits, states is key_states, states), states)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append, and return the dequantized history, which is valid until the next layer's update."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._advance(key_states)
        seen = []
        for name, side, states in zip(("keys", "values"), self._sides, (key_states, value_states), strict=True):
            history = self.buffers.buffer(name, self.rows, self.capacity, states)[: self.batch, :, :end]
            self._dequantize(side, history[:, :, :start])
            history[:, :, start:] = states
            self._append_states(side, states)
            seen.append(history)
        self.length = end
        return seen[0], seen[1]

    def crop(self, max_length: int) -> None:
        """Drop all tokens after the first `max_length`, which must lie in the latest block.

        Raises:
            ValueError: tokens to drop are already quantized.
        """
        if max_length < self.length // BLOCK * BLOCK:
            raise ValueError(f"tokens before {self.length // BLOCK * BLOCK} are quantized")
        super().crop(max_length)

    def _dequantize(self, side: _Side, past: Tensor) -> None:
        """Write all stored tokens to `past` [batch, heads, tokens, head_dim]."""
        tokens = past.shape[2]
        packed = tokens // BLOCK * BLOCK
        side.packed.dequantize(0, packed // BLOCK, past[:, :, :packed])
        past[:, :, packed:] = side.latest[: self.batch, :, : tokens - packed]
        for rows, pad in self._beginnings():
            known = max(0, min(EXACT_FIRST, tokens - pad))
            past[rows, :, pad : pad + known] = side.first[rows, :, :known]

    def _append_states(self, side: _Side, states: Tensor) -> None:
        start, count, done = self.length, states.shape[2], 0
        for rows, pad in self._beginnings():
            begin, end = max(start, pad), min(start + count, pad + EXACT_FIRST)
            if begin < end:
                side.first[rows, :, begin - pad : end - pad] = states[rows, :, begin - start : end - start]
        while done < count:
            place = (start + done) % BLOCK
            part = min(BLOCK - place, count - done)
            side.latest[: self.batch, :, place : place + part] = states[:, :, done : done + part]
            done += part
            if place + part == BLOCK:
                self._pack(side, (start + done) // BLOCK - 1)

    def _pack(self, side: _Side, block: int) -> None:
        """Quantize the latest tokens as block number `block`.

        First tokens and padding are never read from it; they are overwritten so that they do not widen its range.
        """
        states = side.latest[: self.batch]
        for rows, pad in self._beginnings():
            unread = min(pad + EXACT_FIRST - block * BLOCK, BLOCK - 1)
            if unread > 0:
                states[rows, :, :unread] = states[rows, :, -1:]
        side.packed.put(block, states)

    def _beginnings(self) -> Iterator[tuple[slice, int]]:
        """Groups of rows and the column where they begin: one group if all rows begin at the same column."""
        pads = self.pads[: self.batch]
        if len(set(pads)) == 1:
            yield slice(0, self.batch), pads[0]
        else:
            yield from ((slice(row, row + 1), pad) for row, pad in enumerate(pads))

    def _stores(self) -> tuple[Tensor, ...]:
        return tuple(store for side in self._sides for store in (side.first, side.latest, *side.packed.stores))

    def _take(self, rows: Tensor) -> None:
        self.batch = len(rows)
        self.pads = [self.pads[row] for row in rows.tolist()]
        for store in self._stores():
            store[: self.batch] = store.index_select(0, rows.to(store.device))


class _Side:
    """The keys or the values of a layer: quantized blocks, and the exact first and latest tokens."""

    def __init__(self, packed: PackedBlocks, like: Tensor) -> None:
        self.packed = packed
        self.first, self.latest = (
            new_store(like, (packed.rows, like.shape[1], tokens, like.shape[3])) for tokens in (EXACT_FIRST, BLOCK)
        )


def set_pads(cache: Any, pads: Sequence[int]) -> None:
    """Set the padding of the rows of an empty `cache`, where its layers need to know it."""
    for layer in getattr(cache, "layers", ()):
        attention = getattr(layer, "attention", layer)
        if isinstance(attention, PackedLayer):
            attention.pads = list(pads)
