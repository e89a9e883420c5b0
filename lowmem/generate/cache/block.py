"""Keys and values quantized to 8, 4 or 2 bits in blocks of tokens, after KIVI (arXiv 2402.02750).

Some key channels are large for every token, while values have no such channels: keys are therefore quantized per
channel over a block of tokens, values per token. The latest tokens stay in the dtype of the computation until they
fill a block, which is then quantized once. The first tokens (attention sinks) always stay exact, because attention
puts much of its weight on them.

Attention needs the dtype of the computation, so every pass dequantizes the layer's history into scratch buffers that
all layers share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.generate.cache.ring import Ring
from lowmem.generate.cache.rotary import Rotation
from lowmem.generate.cache.storage import new_store
from lowmem.generate.cache.window import WindowLayer
from lowmem.planning.cache import BLOCK, blocks_of

_TINY = torch.finfo(torch.float16).tiny


class OrderedRing(Ring):
    """A window whose tokens are handed to attention in order, because blocks are dequantized in order."""

    @property
    def lowest(self) -> int:
        """The oldest column, padding included, that a token of this pass may attend to, not counting sinks."""
        oldest = max(0, self.columns + 1 - self.window)
        return max(self.sinks, oldest) if self.stream.aligned else oldest

    @property
    def columns(self) -> int:
        """Columns filled before this pass, padding included."""
        return self.stream.read

    def mask(self) -> Tensor | None:
        return self._chunk_mask() if self.stream.in_chunk or not self.stream.aligned else None

    def _cached(self, seen: Tensor) -> Tensor:
        places = torch.arange(self.lowest, max(self.lowest, self.columns))
        numbers = places - (self.columns - seen)
        return torch.where(numbers >= self.sinks, numbers, -1)


class DequantizeBuffers:
    """Scratch buffers that every layer dequantizes its keys and values into, one layer at a time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, rows: int, places: int, like: Tensor) -> Tensor:
        """A buffer [rows, heads, places, head_dim] in the dtype of `like` [batch, heads, tokens, head_dim]."""
        key = (name, rows, places, *like.shape[1::2], like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = new_store(like, (rows, like.shape[1], places, like.shape[3]))
        return self._buffers[key]


class PackedBlocks:
    """Quantized blocks of one layer's keys or values, in a ring buffer of `blocks` blocks.

    Codes are uint8 [rows, heads, blocks, BLOCK * bits / 8, head_dim]; scales and offsets are fp16,
    [rows, heads, blocks, 1, head_dim] for keys and [rows, heads, blocks, BLOCK, 1] for values.
    """

    def __init__(self, rows: int, blocks: int, bits: int, per_channel: bool, like: Tensor) -> None:
        heads, head_dim = like.shape[1], like.shape[3]
        self.rows, self.bits, self.blocks, self._over = rows, bits, blocks, -2 if per_channel else -1
        shape = (rows, heads, blocks, 1, head_dim) if per_channel else (rows, heads, blocks, BLOCK, 1)
        self.codes = new_store(like, (rows, heads, blocks, BLOCK * bits // 8, head_dim), torch.uint8)
        self.scales, self.lows = (new_store(like, shape, torch.float16) for _ in range(2))

    @property
    def stores(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.lows

    def put(self, block: int, states: Tensor) -> None:
        """Quantize `states` [batch, heads, BLOCK, head_dim] and store them as block number `block`."""
        place, batch = block % self.blocks, states.shape[0]
        codes, self.scales[:batch, :, place], self.lows[:batch, :, place] = quantize(states, self.bits, self._over)
        self.codes[:batch, :, place] = pack(codes, self.bits)

    def dequantize(self, first: int, last: int, into: Tensor) -> None:
        """Dequantize blocks `first` to `last` (exclusive) into `into` [batch, heads, tokens, head_dim]."""
        batch = into.shape[0]
        done = 0
        while first < last:
            place = first % self.blocks
            count = min(last - first, self.blocks - place)
            here = slice(place, place + count)
            out = into[:, :, done * BLOCK : (done + count) * BLOCK].unflatten(2, (count, BLOCK))
            unpack(self.codes[:batch, :, here], self.bits, out)
            # Scales in the output's dtype: mixed dtypes take a slow path in torch.
            scales, lows = (store[:batch, :, here].to(out.dtype) for store in (self.scales, self.lows))
            if self._over == -2:
                torch.addcmul(lows, out, scales, out=out)
            else:  # five times faster than `addcmul` when scales broadcast along the innermost dimension
                out.mul_(scales).add_(lows)
            first, done = first + count, done + count


def quantize(states: Tensor, bits: int, over: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes and fp16 scales and offsets, reduced over dimension `over`: states ~ offset + scale * code."""
    wide = states.float()
    lows, highs = wide.amin(over, keepdim=True), wide.amax(over, keepdim=True)
    lows = lows.half()
    scales = ((highs - lows.float()) / (2**bits - 1)).half().clamp_(min=_TINY)
    codes = ((wide - lows.float()) / scales.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scales, lows


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., tokens, n] to bytes [..., tokens * bits / 8, n]; a byte holds one code from each half (or quarter)."""
    parts = codes.chunk(8 // bits, dim=-2)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        packed |= part << (bits * number)
    return packed


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """Inverse of `pack`, written to `out` [..., tokens, n] in its dtype."""
    parts = out.chunk(8 // bits, dim=-2)
    for number, part in enumerate(parts):
        codes = packed >> (bits * number) if number else packed
        part.copy_(codes & (2**bits - 1) if number < len(parts) - 1 else codes)


class BlockLayer(WindowLayer):
    """One layer of a windowed cache: exact sinks, exact latest tokens, and quantized blocks in between.

    Args:
        bits: 8, 4 or 2.
    """

    ring: OrderedRing

    def __init__(self, ring: OrderedRing, rows: int, rotation: Rotation, bits: int, buffers: DequantizeBuffers) -> None:
        super().__init__(ring, rows, rotation)
        self.bits, self.buffers = bits, buffers
        self._bases: dict[int, list[int]] = {}
        """Block number -> the rows' bases when the block was quantized, to which its keys are rotated."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, sinks, blocks = key_states.shape[1], self.ring.sinks, blocks_of(self.ring.slots, True)
        self.keys = new_store(key_states, (self.rows, heads, BLOCK, key_states.shape[-1]))
        self.values = new_store(value_states, (self.rows, heads, BLOCK, value_states.shape[-1]))
        self.first_values = value_states.new_zeros(self.rows, heads, sinks, value_states.shape[-1])
        self.first_keys, self.swapped_keys = torch.zeros(
            2, self.rows, heads, sinks, key_states.shape[-1], device=key_states.device
        )
        self.packed_keys = PackedBlocks(self.rows, blocks, self.bits, True, key_states)
        self.packed_values = PackedBlocks(self.rows, blocks, self.bits, False, value_states)
        self.is_initialized = True

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._overwrite(keys, values)

    def _overwrite(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sinks followed by the window in order."""
        sinks = min(self.ring.sinks, self.ring.columns) if self.ring.stream.aligned else self.ring.sinks
        all_keys, all_values, begin, end = self._dequantize(keys, values)
        count, own = keys.shape[2], slice(end, end + keys.shape[2])
        if sinks:
            rotated = self.first_keys[: self.batch] if count > 1 else self._rotated_sinks()
            all_keys[:, :, begin - sinks : begin] = rotated[:, :, :sinks]
            all_values[:, :, begin - sinks : begin] = self.first_values[: self.batch, :, :sinks]
        all_keys[:, :, own], all_values[:, :, own] = keys, values
        self._append_states(keys, values)
        seen = slice(begin - sinks, end + count)
        return all_keys[:, :, seen], all_values[:, :, seen]

    def _chunk(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys, all_values, begin, end = self._dequantize(keys, values)
        parts = [(all_keys[:, :, begin:end], all_values[:, :, begin:end]), (keys, values)]
        if self.ring.sinks:
            parts.insert(0, self._sink_copies(keys.dtype, keys.shape[2], self.first_values[: self.batch]))
        seen = torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)
        self._append_states(keys, values)
        return seen

    def _dequantize(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Key and value buffers whose columns `begin` to `end` hold the history this pass may attend to.

        There is room for the sinks in front of `begin` and for the new tokens behind `end`.
        """
        ring = self.ring
        lowest, columns = min(ring.lowest, ring.columns), ring.columns
        first, last = lowest // BLOCK, columns // BLOCK
        begin = max(ring.sinks, BLOCK)
        end = begin + columns - lowest
        start = begin - (lowest - first * BLOCK)
        places = begin + ring.slots + BLOCK
        found = []
        for name, packed, latest, states in (
            ("keys", self.packed_keys, self.keys, keys),
            ("values", self.packed_values, self.values, values),
        ):
            buffer = self.buffers.buffer(name, self.rows, places, states)[: self.batch]
            middle = start + (last - first) * BLOCK
            packed.dequantize(first, last, buffer[:, :, start:middle])
            # A block that is partly evicted before it is full also starts in front of `begin`.
            buffer[:, :, middle:end] = latest[: self.batch, :, : columns - last * BLOCK]
            found.append(buffer)
        self._rotate_old_blocks(found[0][:, :, start:], first, last)
        return found[0], found[1], begin, end

    def _rotate_old_blocks(self, keys: Tensor, first: int, last: int) -> None:
        """Rotate blocks that were quantized before the positions were last moved back."""
        now = self.ring.stream.base
        for block in range(first, last):
            if (then := self._bases[block]) == now:
                return  # later blocks are younger
            here = keys[:, :, (block - first) * BLOCK : (block - first + 1) * BLOCK]
            shifts = torch.tensor(then, dtype=torch.float64) - torch.tensor(now, dtype=torch.float64)
            here.copy_(self.rotation(here, shifts[:, None, None]))

    def _append_states(self, keys: Tensor, values: Tensor) -> None:
        self._copy_sinks(keys, values)
        column, done, count = self.ring.columns, 0, keys.shape[2]
        while done < count:
            place = (column + done) % BLOCK
            part = min(BLOCK - place, count - done)
            self.keys[: self.batch, :, place : place + part] = keys[:, :, done : done + part]
            self.values[: self.batch, :, place : place + part] = values[:, :, done : done + part]
            done += part
            if place + part == BLOCK:
                self._quantize_latest((column + done) // BLOCK - 1)

    def _copy_sinks(self, keys: Tensor, values: Tensor) -> None:
        for row, seen in enumerate(self.ring.stream.seen):
            for token in range(max(0, -seen), min(keys.shape[2], self.ring.sinks - seen)):
                key = keys[row, :, token].float()
                self.first_keys[row, :, seen + token] = key
                self.swapped_keys[row, :, seen + token] = self.rotation.swap_pairs(key)
                self.first_values[row, :, seen + token] = values[row, :, token]

    def _quantize_latest(self, block: int) -> None:
        """Quantize the latest tokens as block number `block`.

        Sinks and padding are never read from it; they are overwritten so that they do not widen its range.
        """
        stream = self.ring.stream
        for packed, latest in ((self.packed_keys, self.keys), (self.packed_values, self.values)):
            states = latest[: self.batch]
            for row, seen in enumerate(stream.seen):
                unread = stream.read - seen + self.ring.sinks - block * BLOCK
                if unread > 0:
                    states[row, :, : min(unread, BLOCK - 1)] = states[row, :, -1:]
            packed.put(block, states)
        self._bases[block] = list(stream.base)
        self._bases.pop(block - self.packed_keys.blocks, None)

    def _move_back(self, shifts: Tensor) -> None:
        """Rotate the latest tokens now; quantized blocks follow when they are dequantized."""
        self.rotation.rotate_in_place(self.keys[: self.batch], -shifts)

    def _stores(self) -> tuple[Tensor, ...]:
        exact = (self.keys, self.values, self.first_keys, self.swapped_keys, self.first_values)
        return (*exact, *self.packed_keys.stores, *self.packed_values.stores)

    def batch_select_indices(self, rows: Tensor) -> None:
        super().batch_select_indices(rows)
        chosen = rows.tolist()
        self._bases = {block: [bases[row] for row in chosen] for block, bases in self._bases.items()}
