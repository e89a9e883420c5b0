"""What is known of the inputs of a layer: second moments and mean magnitudes, summed up over a text.

The second moments H = mean of x x^T weigh every error: a change D of the weights changes the outputs by
mean |D x|^2 = trace(D H D^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 512
"""Columns of H that are summed at a time, from the diagonal on: H is symmetric, half of it suffices."""


class Moments:
    """Moments of inputs with `columns` channels: `add` them all, then `finish` once.

    `hessian` is fp32 [columns, columns], `magnitude` fp32 [columns] the mean of |x|.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self.hessian = torch.zeros(columns, columns, device=device)
        self.magnitude = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count inputs [..., columns] in, one token a row."""
        rows = inputs.detach().flatten(0, -2).float()
        for start in range(0, rows.shape[1], _STRIP):
            stop = start + _STRIP
            self.hessian[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        self.magnitude += rows.abs().sum(0)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Turn sums into means and fill in the other half of H."""
        for start in range(0, len(self.hessian), _STRIP):
            stop = start + _STRIP
            self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].t()
        self.hessian /= max(1, self.tokens)
        self.magnitude /= max(1, self.tokens)

    def divide(self, factors: Tensor) -> None:
        """Become the moments of inputs whose channels were divided by `factors` [columns]."""
        self.hessian /= factors[:, None] * factors
        self.magnitude /= factors

    def reorder(self, order: Tensor) -> None:
        """Become the moments of inputs whose channels come in `order`, int64 [columns], without a second matrix."""
        for start in range(0, len(order), _STRIP):
            strip = self.hessian[:, start : start + _STRIP]
            strip.copy_(strip[order])
        for start in range(0, len(order), _STRIP):
            strip = self.hessian[start : start + _STRIP]
            strip.copy_(strip[:, order])
        self.magnitude = self.magnitude[order]

    def cost(self, change: Tensor) -> float:
        """What a change [out, columns] of weights does to the outputs: mean over tokens of the sum of squares."""
        return float(((change @ self.hessian) * change).sum(dtype=torch.float64))
