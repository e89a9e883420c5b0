"""Perplexity: the exponential of a model's mean NLL per token on a text."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import nn

from lowmem.errors import CorruptModel
from lowmem.events import CancelToken, Step
from lowmem.measure.scoring import Segment, score
from lowmem.measure.windows import Passage
from lowmem.messages import msg


@dataclass(slots=True)
class Perplexity:
    """A running perplexity: `nll` is the sum of -log p in nats over `tokens` scored tokens."""

    nll: float = 0.0
    tokens: int = 0

    def add(self, segment: Segment) -> None:
        """
        Raises:
            CorruptModel: a probability is not a number.
        """
        chosen = segment.log_probs.gather(1, segment.targets[:, None])
        self.nll -= chosen.sum(dtype=torch.float64).item()
        self.tokens += len(segment.targets)
        if math.isnan(self.nll):
            raise CorruptModel(
                msg(
                    "The model produced NaN logits within the first {tokens:,} tokens of the text.", tokens=self.tokens
                ),
                msg("Choose another precision, such as fp32. If that does not help, the weights are damaged."),
            )

    @property
    def value(self) -> float:
        """exp of the mean -log p."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf


def perplexity(model: nn.Module, passage: Passage, *, cancel: CancelToken) -> Generator[Step, None, Perplexity]:
    """Measure `model` on `passage`; the generator's return value is the `Perplexity`.

    Raises:
        CorruptModel, Cancelled.
    """
    total = Perplexity()
    yield from score(model, passage, [total], cancel=cancel)
    return total
