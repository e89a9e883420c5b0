"""Bookkeeping of a windowed KV cache: token numbers, position ids, and the slots of the ring buffer.

It is independent of the layers: a pass changes the slots of all layers with the same window in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.generate.cache.rotary import Rotation
from lowmem.planning.cache import LARGEST_CHUNK, MOST_SINK_COPIES


class Stream:
    """The position of each row of a batch, and the updates of the ring buffers in the current pass.

    The tokens of a row are numbered from 0; the left padding of shorter prompts has negative numbers. The position id
    of a token is its number minus the row's `base`.

    Args:
        pads: padding tokens in front of each row.
        limit: upper bound (exclusive) of the model's position ids.
    """

    def __init__(self, pads: Sequence[int], limit: int) -> None:
        self.seen = [-pad for pad in pads]
        self.read = 0
        """Tokens so far, padding included; the same for all rows."""
        self.base = [0] * len(pads)
        self.limit = limit
        self.rings: list[Ring] = []
        self.tokens = 0
        """Tokens of the current pass, 0 between passes."""
        self.shifts: Tensor | None = None
        """Positions by which each row's window moves back before this pass, float64 [rows, 1, 1], or None."""
        self.in_chunk = False

    @property
    def aligned(self) -> bool:
        """Whether all rows are at the same token."""
        return len(set(self.seen)) == 1

    @property
    def span(self) -> int:
        return max(ring.slots for ring in self.rings)

    def most_tokens(self, wanted: int) -> int:
        """The largest number of tokens, up to `wanted`, that the next pass may process."""
        room = min(ring.slots for ring in self.rings) - self.seen[0]
        if self.aligned and room > 0:
            return min(wanted, room)
        for ring in self.rings:
            if ring.sinks:
                wanted = min(wanted, ring.window, max(1, MOST_SINK_COPIES // ring.sinks))
        return max(1, min(wanted, LARGEST_CHUNK, self.limit - self.span))

    def begin(self, tokens: int) -> None:
        self.tokens = tokens
        self._keep_below_limit()
        fits = self.aligned and all(self.seen[0] + tokens <= ring.slots for ring in self.rings)
        self.in_chunk = tokens > 1 and not fits
        for ring in self.rings:
            ring.begin()

    def end(self) -> None:
        self.seen = [seen + self.tokens for seen in self.seen]
        self.read += self.tokens
        self.tokens = 0

    def _keep_below_limit(self) -> None:
        """Move the positions of rows that would exceed the limit back to where their window is just full."""
        shifts = [0] * len(self.seen)
        for row, (seen, base) in enumerate(zip(self.seen, self.base, strict=True)):
            if seen - base + self.tokens > self.limit:
                shifts[row] = seen - self.span - base
                self.base[row] += shifts[row]
        self.shifts = torch.tensor(shifts, dtype=torch.float64)[:, None, None] if any(shifts) else None

    def numbers(self) -> Tensor:
        """Token numbers of this pass, int64 [rows, tokens]."""
        return torch.tensor(self.seen)[:, None] + torch.arange(self.tokens)

    def positions(self) -> Tensor:
        """Position ids of this pass, int64 [rows, tokens]; padding counts as token 0."""
        return self.numbers().clamp(min=0) - torch.tensor(self.base)[:, None]

    def select(self, rows: Sequence[int]) -> None:
        self.seen = [self.seen[row] for row in rows]
        self.base = [self.base[row] for row in rows]


class Writes(NamedTuple):
    """Row, token in the pass and slot of every token to write, int64 [3, tokens]; `sinks` are those in sink slots."""

    every: Tensor
    sinks: Tensor


class Ring:
    """Which slot holds which token, shared by all layers with the same `sinks` and `window`.

    Slots 0 to sinks - 1 keep the first tokens; the others form a ring buffer that overwrites the oldest token.
    """

    def __init__(self, stream: Stream, sinks: int, window: int) -> None:
        self.stream, self.sinks, self.window = stream, sinks, window
        self.slots = sinks + window
        self._factors: dict[Rotation, tuple[Tensor, Tensor]] = {}
        self._writes: Writes | None = None
        stream.rings.append(self)

    def begin(self) -> None:
        self._factors.clear()
        self._writes = None

    @property
    def appends(self) -> bool:
        """Whether this pass's tokens go behind all others and nothing is evicted."""
        stream = self.stream
        return not stream.in_chunk and stream.aligned and stream.seen[0] + stream.tokens <= self.slots

    def slot(self, number: int) -> int:
        return number if number < self.sinks else self.sinks + (number - self.sinks) % self.window

    def writes(self, device: torch.device) -> Writes:
        """Every token of the pass that is still cached after it."""
        if self._writes is None:
            last = self.stream.tokens
            found = [
                (row, token, self.slot(seen + token))
                for row, seen in enumerate(self.stream.seen)
                for token in range(max(0, -seen), last)
                if seen + token < self.sinks or token >= last - self.window
            ]
            every, sinks = (
                torch.tensor(part, dtype=torch.long).reshape(-1, 3).T.to(device)
                for part in (found, [one for one in found if one[2] < self.sinks])
            )
            self._writes = Writes(every, sinks)
        return self._writes

    def sink_factors(self, rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin that rotate the sinks' original keys to just before the window, [rows, 1, tokens, 1, head_dim]."""
        if rotation not in self._factors:
            moved = (self.stream.numbers() - (self.slots - 1)).clamp(min=0)
            shifts = moved.double() - torch.tensor(self.stream.base)[:, None]
            cos, sin = rotation.factors(shifts[:, None, :, None])
            self._factors[rotation] = cos.to(device), sin.to(device)
        return self._factors[rotation]

    def mask(self) -> Tensor | None:
        """Attention mask of the pass, bool [rows, 1, tokens, keys]; None if it is full or plainly causal."""
        if self.stream.in_chunk:
            return self._chunk_mask()
        if self.stream.aligned:
            return None
        filled = torch.tensor(self.stream.seen) + 1
        if int(filled.min()) >= self.slots:
            return None
        return (torch.arange(self.slots) < filled[:, None])[:, None, None]

    def _chunk_mask(self) -> Tensor:
        """The mask over one copy of the sinks per token (each at its own distance), the window's slots, and the chunk."""
        numbers = self.stream.numbers()
        rows, tokens = numbers.shape
        itself = torch.eye(tokens, dtype=torch.bool)
        stored = torch.arange(self.sinks) < numbers[:, :1]
        sinks = (itself[:, :, None] & stored[:, None, None]).reshape(rows, tokens, tokens * self.sinks)
        query, cached, new = numbers[:, :, None], self._cached(numbers[:, :1])[:, None], numbers[:, None]
        window = (cached >= 0) & (query - cached < self.window)
        chunk = (new >= 0) & (new <= query) & ((query - new < self.window) | (new < self.sinks))
        # Padding attends to itself: with nothing to attend to, its states would be NaN and spread to other rows' sums.
        return torch.cat([sinks, window, chunk | itself], dim=-1)[:, None]

    def _cached(self, seen: Tensor) -> Tensor:
        """The token number in every slot of the window, int64 [rows, window]; -1 for empty slots."""
        slot = torch.arange(self.window) + self.sinks
        behind = seen - 1 - slot
        return torch.where(behind >= 0, slot + self.window * behind.div(self.window, rounding_mode="floor"), -1)
