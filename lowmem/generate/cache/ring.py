"""Where the tokens of a stream are: their numbers in the text, the positions the model is told, the slots they lie in.

Knows nothing of layers: what a pass does to the slots is the same for all layers that keep the same window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowmem.generate.cache.rotary import Turn
from lowmem.planning.cache import LARGEST_CHUNK, MOST_SINK_COPIES


class Stream:
    """Where the rows of a batch are in their texts, and what one pass does to every ring of slots.

    A row's tokens count from 0; in a batch of unequal prompts, padded on the left, a row begins below 0.
    The position that the model is told is a token's number less the row's `base`.

    Args:
        pads: padding in front of each row.
        limit: positions the model can be told are below this.
    """

    def __init__(self, pads: Sequence[int], limit: int) -> None:
        self.seen = [-pad for pad in pads]
        self.read = 0
        """Tokens so far, padding counted: the same for all rows."""
        self.base = [0] * len(pads)
        self.limit = limit
        self.rings: list[Ring] = []
        self.tokens = 0
        """Of the pass that has begun, 0 between passes."""
        self.shifts: Tensor | None = None
        """Positions by which the rows' windows go back before this pass, float64 [rows, 1, 1], or None."""
        self.in_chunk = False

    @property
    def even(self) -> bool:
        """Are all rows at the same token?"""
        return len(set(self.seen)) == 1

    @property
    def span(self) -> int:
        return max(ring.slots for ring in self.rings)

    def most_tokens(self, wanted: int) -> int:
        """Tokens that the next pass may have."""
        room = min(ring.slots for ring in self.rings) - self.seen[0]
        if self.even and room > 0:
            return min(wanted, room)
        for ring in self.rings:
            if ring.sinks:
                wanted = min(wanted, ring.window, max(1, MOST_SINK_COPIES // ring.sinks))
        return max(1, min(wanted, LARGEST_CHUNK, self.limit - self.span))

    def begin(self, tokens: int) -> None:
        self.tokens = tokens
        self._keep_below_limit()
        fits = self.even and all(self.seen[0] + tokens <= ring.slots for ring in self.rings)
        self.in_chunk = tokens > 1 and not fits
        for ring in self.rings:
            ring.begin()

    def end(self) -> None:
        self.seen = [seen + self.tokens for seen in self.seen]
        self.read += self.tokens
        self.tokens = 0

    def _keep_below_limit(self) -> None:
        """Take the positions of rows that would pass the limit back to where their window is just full."""
        shifts = [0] * len(self.seen)
        for row, (seen, base) in enumerate(zip(self.seen, self.base, strict=True)):
            if seen - base + self.tokens > self.limit:
                shifts[row] = seen - self.span - base
                self.base[row] += shifts[row]
        self.shifts = torch.tensor(shifts, dtype=torch.float64)[:, None, None] if any(shifts) else None

    def numbers(self) -> Tensor:
        """The numbers of this pass's tokens in their texts, int64 [rows, tokens]."""
        return torch.tensor(self.seen)[:, None] + torch.arange(self.tokens)

    def positions(self) -> Tensor:
        """What the model is told, int64 [rows, tokens]; padding gets 0."""
        return self.numbers().clamp(min=0) - torch.tensor(self.base)[:, None]

    def select(self, rows: Sequence[int]) -> None:
        self.seen = [self.seen[row] for row in rows]
        self.base = [self.base[row] for row in rows]


class Writes(NamedTuple):
    """Rows, tokens of the pass and slots, int64 [3, tokens]: of all that are written, and of the sinks among them."""

    every: Tensor
    sinks: Tensor


class Ring:
    """Which slot holds which token, for all layers that keep the same `sinks` and `window`.

    Slots 0 to sinks - 1 hold the first tokens for ever, the others are overwritten in turn.
    """

    def __init__(self, stream: Stream, sinks: int, window: int) -> None:
        self.stream, self.sinks, self.window = stream, sinks, window
        self.slots = sinks + window
        self._factors: dict[Turn, tuple[Tensor, Tensor]] = {}
        self._writes: Writes | None = None
        stream.rings.append(self)

    def begin(self) -> None:
        self._factors.clear()
        self._writes = None

    @property
    def appends(self) -> bool:
        """Do this pass's tokens go behind all others, and is nothing forgotten?"""
        stream = self.stream
        return not stream.in_chunk and stream.even and stream.seen[0] + stream.tokens <= self.slots

    def slot(self, number: int) -> int:
        return number if number < self.sinks else self.sinks + (number - self.sinks) % self.window

    def writes(self, device: torch.device) -> Writes:
        """Every token of the pass that is still remembered after it."""
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

    def sink_factors(self, turn: Turn, device: torch.device) -> tuple[Tensor, Tensor]:
        """Factors that take first copies of the sinks to their place before the window, [rows, 1, tokens, 1, head_dim]."""
        if turn not in self._factors:
            moved = (self.stream.numbers() - (self.slots - 1)).clamp(min=0)
            shifts = moved.double() - torch.tensor(self.stream.base)[:, None]
            cos, sin = turn.factors(shifts[:, None, :, None])
            self._factors[turn] = cos.to(device), sin.to(device)
        return self._factors[turn]

    def mask(self) -> Tensor | None:
        """What each token of the pass sees, bool [rows, 1, tokens, keys]; None where it is all or plainly causal."""
        if self.stream.in_chunk:
            return self._chunk_mask()
        if self.stream.even:
            return None
        filled = torch.tensor(self.stream.seen) + 1
        if int(filled.min()) >= self.slots:
            return None
        return (torch.arange(self.slots) < filled[:, None])[:, None, None]

    def _chunk_mask(self) -> Tensor:
        """Over a copy of the sinks for each token, at its own distance, then the window's slots, then the chunk."""
        numbers = self.stream.numbers()
        rows, tokens = numbers.shape
        itself = torch.eye(tokens, dtype=torch.bool)
        stored = torch.arange(self.sinks) < numbers[:, :1]
        sinks = (itself[:, :, None] & stored[:, None, None]).reshape(rows, tokens, tokens * self.sinks)
        asking, held, new = numbers[:, :, None], self._held(numbers[:, :1])[:, None], numbers[:, None]
        window = (held >= 0) & (asking - held < self.window)
        chunk = (new >= 0) & (new <= asking) & ((asking - new < self.window) | (new < self.sinks))
        # Padding sees itself, or its states would be no numbers and spoil the sums of the others.
        return torch.cat([sinks, window, chunk | itself], dim=-1)[:, None]

    def _held(self, seen: Tensor) -> Tensor:
        """The number of the token in every slot of the window, int64 [rows, window], -1 in empty ones."""
        slot = torch.arange(self.window) + self.sinks
        behind = seen - 1 - slot
        return torch.where(behind >= 0, slot + self.window * behind.div(self.window, rounding_mode="floor"), -1)
