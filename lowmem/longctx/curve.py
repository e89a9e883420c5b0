"""Perplexity along a text, in stretches of equal length, as a consumer of `measure.scoring`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowmem.measure.scoring import Segment

LEAST_SPAN = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Perplexity of a stretch of the text, tokens `start` to `end`."""

    start: int
    end: int
    perplexity: float


class Curve:
    """Collects the surprise of `tokens` scored tokens in about `points` stretches."""

    def __init__(self, tokens: int, points: int) -> None:
        self._span = max(LEAST_SPAN, math.ceil(tokens / points))
        self._sums: list[float] = []
        self._tokens = 0

    def add(self, segment: Segment) -> None:
        surprise = -segment.log_probs.gather(1, segment.targets[:, None])[:, 0]
        while len(surprise):
            room = self._span - self._tokens % self._span
            if room == self._span:
                self._sums.append(0.0)
            here, surprise = surprise[:room], surprise[room:]
            self._sums[-1] += float(here.sum())
            self._tokens += len(here)

    def spans(self) -> Sequence[Span]:
        starts = range(0, self._tokens, self._span)
        ends = [min(start + self._span, self._tokens) for start in starts]
        return [
            Span(start, end, math.exp(min(700.0, nll / (end - start))))
            for start, end, nll in zip(starts, ends, self._sums, strict=True)
        ]
