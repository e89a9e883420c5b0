"""Keys and values in 8, 4 or 2 bits, after KIVI (arXiv 2402.02750).

Keys have channels that are large for every token, values have not: so keys are quantized per channel over a
block of tokens, values per token. The latest tokens stay as they are until a block of them is full; then it is
quantized, once and never again. The first tokens, on which attention leans, stay exact too.

Attention wants the computation's dtype. Every pass unfolds the layer's history into scratch buffers, which
all layers share; nothing that is unfolded is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.generate.cache.ring import Ring
from lowmem.generate.cache.rotary import Turn
from lowmem.generate.cache.window import WindowLayer
from lowmem.planning.cache import BLOCK, blocks_of

_TINY = torch.finfo(torch.float16).tiny


class OrderedRing(Ring):
    """A window whose tokens are handed out in order, as they are unfolded."""

    @property
    def lowest(self) -> int:
        """The oldest place, padding counted, that a token of this pass may see, sinks aside."""
        oldest = max(0, self.columns + 1 - self.window)
        return max(self.sinks, oldest) if self.stream.even else oldest

    @property
    def columns(self) -> int:
        """Places that were filled before this pass, padding counted."""
        return self.stream.read

    def mask(self) -> Tensor | None:
        return self._chunk_mask() if self.stream.in_chunk or not self.stream.even else None

    def _held(self, seen: Tensor) -> Tensor:
        places = torch.arange(self.lowest, max(self.lowest, self.columns))
        numbers = places - (self.columns - seen)
        return torch.where(numbers >= self.sinks, numbers, -1)


class Unfolded:
    """A pair of buffers, the one place where keys and values exist unfolded, each layer's in its turn."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    def buffer(self, name: str, rows: int, places: int, like: Tensor) -> Tensor:
        """[rows, heads, places, head_dim] for `like` [batch, heads, tokens, head_dim]."""
        key = (name, rows, places, *like.shape[1::2], like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = like.new_zeros(rows, like.shape[1], places, like.shape[3])
        return self._buffers[key]


class Packed:
    """Blocks of one layer's keys or of its values, in a ring of `blocks`.

    Codes lie as [rows, heads, blocks, BLOCK * bits / 8, head_dim]; scales and offsets in fp16, for keys
    [rows, heads, blocks, 1, head_dim], for values [rows, heads, blocks, BLOCK, 1].
    """

    def __init__(self, rows: int, blocks: int, bits: int, per_channel: bool, like: Tensor) -> None:
        heads, head_dim = like.shape[1], like.shape[3]
        self.rows, self.bits, self.blocks, self._over = rows, bits, blocks, -2 if per_channel else -1
        shape = (rows, heads, blocks, 1, head_dim) if per_channel else (rows, heads, blocks, BLOCK, 1)
        self.codes = torch.zeros(
            rows, heads, blocks, BLOCK * bits // 8, head_dim, dtype=torch.uint8, device=like.device
        )
        self.scales, self.lows = (torch.zeros(shape, dtype=torch.float16, device=like.device) for _ in range(2))

    @property
    def stores(self) -> tuple[Tensor, ...]:
        return self.codes, self.scales, self.lows

    def put(self, block: int, states: Tensor) -> None:
        """Quantize `states` [batch, heads, BLOCK, head_dim] as block number `block`."""
        place, batch = block % self.blocks, states.shape[0]
        codes, self.scales[:batch, :, place], self.lows[:batch, :, place] = quantize(states, self.bits, self._over)
        self.codes[:batch, :, place] = pack(codes, self.bits)

    def unfold(self, first: int, last: int, into: Tensor) -> None:
        """Blocks `first` to `last`, exclusive, into [batch, heads, tokens, head_dim]."""
        batch = into.shape[0]
        done = 0
        while first < last:
            place = first % self.blocks
            count = min(last - first, self.blocks - place)
            here = slice(place, place + count)
            out = into[:, :, done * BLOCK : (done + count) * BLOCK].unflatten(2, (count, BLOCK))
            unpack(self.codes[:batch, :, here], self.bits, out)
            # Scales of the dtype itself: mixed ones would take torch's slow path.
            scales, lows = (store[:batch, :, here].to(out.dtype) for store in (self.scales, self.lows))
            if self._over == -2:
                torch.addcmul(lows, out, scales, out=out)
            else:  # five times as fast as `addcmul` where scales are broadcast along the innermost dimension
                out.mul_(scales).add_(lows)
            first, done = first + count, done + count


def quantize(states: Tensor, bits: int, over: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, fp16 scales and offsets over dimension `over`, with states ~ offset + scale * code."""
    wide = states.float()
    lows, highs = wide.amin(over, keepdim=True), wide.amax(over, keepdim=True)
    lows = lows.half()
    scales = ((highs - lows.float()) / (2**bits - 1)).half().clamp_(min=_TINY)
    codes = ((wide - lows.float()) / scales.float()).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scales, lows


def pack(codes: Tensor, bits: int) -> Tensor:
    """[..., tokens, n] -> [..., tokens * bits / 8, n]: a byte holds a number of one token of each half, or quarter."""
    parts = codes.chunk(8 // bits, dim=-2)
    packed = parts[0].clone()
    for number, part in enumerate(parts[1:], 1):
        packed |= part << (bits * number)
    return packed


def unpack(packed: Tensor, bits: int, out: Tensor) -> None:
    """The inverse of `pack`, as numbers of the dtype of `out` [..., tokens, n]."""
    parts = out.chunk(8 // bits, dim=-2)
    for number, part in enumerate(parts):
        codes = packed >> (bits * number) if number else packed
        part.copy_(codes & (2**bits - 1) if number < len(parts) - 1 else codes)


class BlockLayer(WindowLayer):
    """One layer's sinks and latest tokens as they are, and packed blocks of what lies between.

    Args:
        bits: 8, 4 or 2.
    """

    ring: OrderedRing

    def __init__(self, ring: OrderedRing, rows: int, turn: Turn, bits: int, unfolded: Unfolded) -> None:
        super().__init__(ring, rows, turn)
        self.bits, self.unfolded = bits, unfolded
        self._bases: dict[int, list[int]] = {}
        """Of each block, the rows' bases when it was quantized: its keys have been turned to them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, sinks, blocks = key_states.shape[1], self.ring.sinks, blocks_of(self.ring.slots, True)
        self.keys = key_states.new_zeros(self.rows, heads, BLOCK, key_states.shape[-1])
        self.values = value_states.new_zeros(self.rows, heads, BLOCK, value_states.shape[-1])
        self.first_values = value_states.new_zeros(self.rows, heads, sinks, value_states.shape[-1])
        self.first_keys, self.mixed_keys = torch.zeros(
            2, self.rows, heads, sinks, key_states.shape[-1], device=key_states.device
        )
        self.packed_keys = Packed(self.rows, blocks, self.bits, True, key_states)
        self.packed_values = Packed(self.rows, blocks, self.bits, False, value_states)
        self.is_initialized = True

    def _append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._overwrite(keys, values)

    def _overwrite(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The window in order behind its sinks, which lie in front of it whatever they were turned to."""
        sinks = min(self.ring.sinks, self.ring.columns) if self.ring.stream.even else self.ring.sinks
        all_keys, all_values, begin, end = self._unfold(keys, values)
        count, own = keys.shape[2], slice(end, end + keys.shape[2])
        if sinks:
            turned = self.first_keys[: self.batch] if count > 1 else self._turned_sinks()
            all_keys[:, :, begin - sinks : begin] = turned[:, :, :sinks]
            all_values[:, :, begin - sinks : begin] = self.first_values[: self.batch, :, :sinks]
        all_keys[:, :, own], all_values[:, :, own] = keys, values
        self._absorb(keys, values)
        seen = slice(begin - sinks, end + count)
        return all_keys[:, :, seen], all_values[:, :, seen]

    def _chunk(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        all_keys, all_values, begin, end = self._unfold(keys, values)
        parts = [(all_keys[:, :, begin:end], all_values[:, :, begin:end]), (keys, values)]
        if self.ring.sinks:
            parts.insert(0, self._sink_copies(keys.dtype, keys.shape[2], self.first_values[: self.batch]))
        seen = torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)
        self._absorb(keys, values)
        return seen

    def _unfold(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Buffers that hold what a pass may see from `begin` to `end`, with room in front for sinks and behind for more."""
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
            buffer = self.unfolded.buffer(name, self.rows, places, states)[: self.batch]
            middle = start + (last - first) * BLOCK
            packed.unfold(first, last, buffer[:, :, start:middle])
            # A block that is half forgotten and not yet full lies in front of `begin` as well.
            buffer[:, :, middle:end] = latest[: self.batch, :, : columns - last * BLOCK]
            found.append(buffer)
        self._turn_old_blocks(found[0][:, :, start:], first, last)
        return found[0], found[1], begin, end

    def _turn_old_blocks(self, keys: Tensor, first: int, last: int) -> None:
        """Turn back blocks that were quantized before the positions came back to the beginning."""
        now = self.ring.stream.base
        for block in range(first, last):
            if (then := self._bases[block]) == now:
                return  # later blocks are younger
            here = keys[:, :, (block - first) * BLOCK : (block - first + 1) * BLOCK]
            shifts = torch.tensor(then, dtype=torch.float64) - torch.tensor(now, dtype=torch.float64)
            here.copy_(self.turn(here, shifts[:, None, None]))

    def _absorb(self, keys: Tensor, values: Tensor) -> None:
        self._keep_sinks(keys, values)
        column, done, count = self.ring.columns, 0, keys.shape[2]
        while done < count:
            place = (column + done) % BLOCK
            part = min(BLOCK - place, count - done)
            self.keys[: self.batch, :, place : place + part] = keys[:, :, done : done + part]
            self.values[: self.batch, :, place : place + part] = values[:, :, done : done + part]
            done += part
            if place + part == BLOCK:
                self._retire((column + done) // BLOCK - 1)

    def _keep_sinks(self, keys: Tensor, values: Tensor) -> None:
        for row, seen in enumerate(self.ring.stream.seen):
            for token in range(max(0, -seen), min(keys.shape[2], self.ring.sinks - seen)):
                key = keys[row, :, token].float()
                self.first_keys[row, :, seen + token] = key
                self.mixed_keys[row, :, seen + token] = self.turn.mixed(key)
                self.first_values[row, :, seen + token] = values[row, :, token]

    def _retire(self, block: int) -> None:
        """Quantize the latest block. Sinks and padding, which are never read from it, must not widen its range."""
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
        """Only the latest tokens are turned; packed blocks when they are unfolded."""
        self.turn.move(self.keys[: self.batch], -shifts)

    def _stores(self) -> tuple[Tensor, ...]:
        exact = (self.keys, self.values, self.first_keys, self.mixed_keys, self.first_values)
        return (*exact, *self.packed_keys.stores, *self.packed_values.stores)

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        chosen = rows.tolist()
        self._bases = {block: [bases[row] for row in chosen] for block, bases in self._bases.items()}
