"""Statistics of a layer's inputs over the calibration text: the Hessian of its output error, and mean magnitudes.

The Hessian H = mean of x x^T over tokens (up to a factor of 2, as in GPTQ, arXiv 2210.17323) weighs every error: a change D of
the weights changes the outputs by mean |D x|^2 = trace(D H D^T).
"""

from __future__ import annotations

import torch
from torch import Tensor

_STRIP = 512
"""Columns of H accumulated at a time, from the diagonal on: H is symmetric, so half of it suffices."""


class Hessian:
    """Second moments of inputs with `columns` channels: `add` all inputs, then `finish` once.

    Attributes:
        matrix: fp32 [columns, columns], the mean of x x^T.
        magnitude: fp32 [columns], the mean of |x|.
        tokens: number of inputs counted.
    """

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.magnitude = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Accumulate inputs [..., columns], one token per row."""
        rows = inputs.detach().flatten(0, -2).float()
        for start in range(0, rows.shape[1], _STRIP):
            stop = start + _STRIP
            self.matrix[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        self.magnitude += rows.abs().sum(0)
        self.tokens += rows.shape[0]

    def finish(self) -> None:
        """Turn sums into means and fill in the other half of the matrix."""
        for start in range(0, len(self.matrix), _STRIP):
            stop = start + _STRIP
            self.matrix[stop:, start:stop] = self.matrix[start:stop, stop:].t()
        self.matrix /= max(1, self.tokens)
        self.magnitude /= max(1, self.tokens)

    def copy(self) -> Hessian:
        made = Hessian(0)
        made.matrix, made.magnitude, made.tokens = self.matrix.clone(), self.magnitude.clone(), self.tokens
        return made

    def divide(self, scales: Tensor) -> None:
        """Become the Hessian of inputs whose channels are divided by `scales` [columns]."""
        self.matrix /= scales[:, None] * scales
        self.magnitude /= scales

    def reorder(self, order: Tensor) -> None:
        """Permute the channels by `order`, int64 [columns], in place."""
        for start in range(0, len(order), _STRIP):
            strip = self.matrix[:, start : start + _STRIP]
            strip.copy_(strip[order])
        for start in range(0, len(order), _STRIP):
            strip = self.matrix[start : start + _STRIP]
            strip.copy_(strip[:, order])
        self.magnitude = self.magnitude[order]

    def output_error(self, change: Tensor) -> float:
        """The squared error that a change [out, columns] of the weights makes in the outputs, averaged over tokens."""
        return float(((change @ self.matrix) * change).sum(dtype=torch.float64))
