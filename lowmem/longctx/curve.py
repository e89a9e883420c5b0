"""Perplexity along a text, in spans of equal length, as a consumer of `measure.scoring`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem.measure.scoring import Segment

MIN_SPAN = 16
"""Tokens below which a span's perplexity is too noisy to plot."""


@dataclass(frozen=True, slots=True)
class Span:
    """Perplexity of the tokens `start` to `end` (exclusive) of a text."""

    start: int
    end: int
    perplexity: float


def perplexity(nll: float, tokens: int) -> float:
    """Of `tokens` whose NLL in nats is `nll` in all; finite even where exp would overflow."""
    return math.exp(min(700.0, nll / max(1, tokens)))


class Curve:
    """Sums the NLL of `tokens` scored tokens over about `points` spans."""

    def __init__(self, tokens: int, points: int) -> None:
        self._span = max(MIN_SPAN, math.ceil(tokens / points))
        self._sums: list[float] = []
        self._tokens = 0

    def add(self, segment: Segment) -> None:
        nll = -segment.log_probs.gather(1, segment.targets[:, None])[:, 0]
        while len(nll):
            room = self._span - self._tokens % self._span
            if room == self._span:
                self._sums.append(0.0)
            here, nll = nll[:room], nll[room:]
            self._sums[-1] += float(here.sum())
            self._tokens += len(here)

    def spans(self) -> Sequence[Span]:
        starts = range(0, self._tokens, self._span)
        ends = [min(start + self._span, self._tokens) for start in starts]
        return [
            Span(start, end, perplexity(nll, end - start))
            for start, end, nll in zip(starts, ends, self._sums, strict=True)
        ]
