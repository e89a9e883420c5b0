"""GPTQ's arithmetic (arXiv 2210.17323): codes chosen column by column, each error made up for by the columns to come.

For inputs with second moments H the columns are taken in some order; rounding one leaves an error that the
Cholesky factor of H^-1 spreads best over the rest. Three departures from the published code:

- A group's grid is fitted when its turn comes, to weights that carry all corrections so far. The published blocks of 128
  columns apply them at the block's end, so smaller groups see stale weights.
- The fit weighs each column's error by what the columns after it cannot make up for (1 / U_jj^2).
- Sweeps of coordinate descent on the same objective follow: each scale refitted, each code chosen anew given all others.

Matrices are worked on transposed, [in, rows], so that a column of weights lies together in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.background import stoppable
from lowmem.events import CancelToken
from lowmem.kernels.grid import as_stored, fit
from lowmem.kernels.quantized import WHOLE_ROW, Quantized, consecutive, largest_code
from lowmem.quant.estimate import ROWS_BYTES
from lowmem.quant.moments import Moments

BLOCK = 128
"""Columns whose corrections are applied to the rest at once."""

FLOOR = 1e-3
"""Damping relative to the mean of H's diagonal, for inputs that the text never excites."""

_MOST_DAMPING = 1e3


@dataclass(frozen=True, slots=True)
class Problem:
    """What all rows of the weights have in common, columns in the order in which they are taken.

    Args:
        order: int64 [in], the column taken at each position.
        runs: the stored group of each run of `size` positions.
        hessian: damped second moments, [in, in].
        damped: what was added to its diagonal, [in].
        factor: upper triangular U with U^T U = hessian^-1.
    """

    order: Tensor
    runs: Tensor
    size: int
    hessian: Tensor
    damped: Tensor
    factor: Tensor
    bits: int
    symmetric: bool
    search: bool
    sweeps: int

    def cost(self, change: Tensor) -> float:
        """What a change [in, rows] of the weights does to the outputs, see `Moments.cost`."""
        damping = (change.square().sum(1) * self.damped).sum(dtype=torch.float64)
        return float(((self.hessian @ change) * change).sum(dtype=torch.float64) - damping)


def solve(
    weights: Sequence[Tensor],
    moments: Moments,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    order: str,
    damping: float,
    search: bool,
    sweeps: int,
    cancel: CancelToken,
) -> list[Quantized]:
    """Codes for weights [out, in] that share the inputs described by `moments`, which are used up.

    Args:
        order: "groups" takes the groups and the columns within each by falling importance, "activation" all
            columns, forming groups in that order; "none" keeps the order.
        damping: share of H's diagonal that is added to it.

    Raises:
        Cancelled.
    """
    columns = moments.hessian.shape[0]
    size = columns if group_size == WHOLE_ROW else group_size
    permutation, runs, groups = _order(moments.hessian.diagonal(), size, order)
    if order != "none":
        moments.reorder(permutation)
    damped, factor = _factorise(moments.hessian, damping, cancel)
    problem = Problem(permutation, runs, size, moments.hessian, damped, factor, bits, symmetric, search, sweeps)
    return [_quantize(weight, problem, groups, cancel) for weight in weights]


def _order(importance: Tensor, size: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """(order, runs) as in `Problem`, and the stored group of each input.

    "groups" is the group-aware ordering of arXiv 2505.14638: nearly as good as "activation", and inputs
    that follow each other share a group, which is what fast kernels want.
    """
    columns, device = len(importance), importance.device
    runs = torch.arange(columns // size, device=device)
    groups = consecutive(columns, size, device)
    if order == "none":
        return torch.arange(columns, device=device), runs, groups
    if order == "activation":
        permutation = importance.argsort(descending=True, stable=True)
        return permutation, runs, groups[permutation.argsort()].contiguous()
    by_group = importance.view(-1, size)
    runs = by_group.amax(1).argsort(descending=True, stable=True)
    within = by_group.argsort(dim=1, descending=True, stable=True)[runs]
    return (within + runs[:, None] * size).flatten(), runs, groups


def _factorise(hessian: Tensor, damping: float, cancel: CancelToken) -> tuple[Tensor, Tensor]:
    """What is added to H's diagonal, and the factor; more for as long as H is not positive definite in fp32."""
    diagonal = hessian.diagonal().clone()
    floor = FLOOR * float(diagonal.mean()) or 1.0
    while True:
        hessian.diagonal().copy_(diagonal * (1 + damping) + floor)
        factor = stoppable(lambda: _inverse_factor(hessian), cancel)
        if factor is not None or damping > _MOST_DAMPING:
            break
        damping = max(2 * damping, 0.01)
        floor *= 2
    if factor is None:  # so ill-conditioned that only the diagonal can be trusted
        factor = hessian.diagonal().rsqrt().diag()
    return hessian.diagonal() - diagonal, factor


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    # In place: with 11,008 inputs, as in a 7B, each further matrix would be half a gigabyte.
    torch.cholesky_inverse(factor, out=factor)
    torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
    return None if failed or not bool(factor.sum().isfinite()) else factor


def _quantize(weight: Tensor, problem: Problem, groups: Tensor, cancel: CancelToken) -> Quantized:
    rows, columns = weight.shape
    count = len(problem.runs)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, count, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(rows, count, dtype=torch.uint8, device=weight.device)
    error = size = 0.0
    inverse = problem.order.argsort()
    step = max(1, ROWS_BYTES // (4 * columns))
    for start in range(0, rows, step):
        here = slice(start, start + step)
        target = weight[here].t()[problem.order].float()
        state = _Rows(target, problem)
        state.round_columns(cancel)
        for _ in range(problem.sweeps):
            state.descend(cancel)
        codes[here] = state.codes[inverse].t()
        scales[here, problem.runs], zeros[here, problem.runs] = state.scales.t().half(), state.zeros.t().to(torch.uint8)
        error += problem.cost(state.values() - target)
        size += problem.cost(target)
    return Quantized(codes, scales, zeros, groups, problem.bits, error / max(size, 1e-30))


class _Rows:
    """Some rows of one weight on their way: `target` fp32 [in, rows]; scales and zeros fp32 [runs, rows]."""

    def __init__(self, target: Tensor, problem: Problem) -> None:
        self._target, self._problem = target, problem
        columns, rows = target.shape
        self.codes = torch.empty_like(target)
        self.scales = target.new_empty(columns // problem.size, rows)
        self.zeros = torch.empty_like(self.scales)

    def values(self) -> Tensor:
        """What the codes stand for, [in, rows]."""
        steps = self.codes.view(-1, self._problem.size, self.codes.shape[1]) - self.zeros[:, None]
        return (steps * self.scales[:, None]).flatten(0, 1)

    def round_columns(self, cancel: CancelToken) -> None:
        """Choose every code once, in order, passing errors on."""
        factor, size = self._problem.factor, self._problem.size
        weight = self._target.clone()
        for run in range(len(self.scales)):
            first, end = run * size, (run + 1) * size
            importance = factor.diagonal()[first:end].square().reciprocal()
            scale, zero = fit(
                weight[first:end].t().contiguous(),
                self._problem.bits,
                self._problem.symmetric,
                importance,
                self._problem.search,
            )
            self.scales[run], self.zeros[run] = scale.squeeze(1), zero.squeeze(1)
            for start in range(first, end, BLOCK):
                stop = min(start + BLOCK, end)
                errors = self._round_block(weight[start:stop], run, start, stop, cancel)
                weight[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)

    def _round_block(self, weight: Tensor, run: int, start: int, stop: int, cancel: CancelToken) -> Tensor:
        """Codes of columns [start, stop), whose errors within the block are passed on at once; the errors."""
        scale, zero, largest = self.scales[run], self.zeros[run], largest_code(self._problem.bits)
        factor = self._problem.factor[start:stop, start:stop]
        diagonal = factor.diagonal().tolist()
        errors = torch.empty_like(weight)
        for i in range(stop - start):
            cancel.check()
            code = torch.div(weight[i], scale).round_().add_(zero).clamp_(0, largest)
            self.codes[start + i] = code
            torch.sub(weight[i], code.sub_(zero).mul_(scale), out=errors[i]).div_(diagonal[i])
            weight[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        return errors

    def descend(self, cancel: CancelToken) -> None:
        """One sweep of coordinate descent over all scales and codes: the objective never rises."""
        hessian, size = self._problem.hessian, self._problem.size
        values = self.values()
        gradient = hessian @ (self._target - values)
        for run in range(len(self.scales)):
            first, end = run * size, (run + 1) * size
            self._refit(run, values[first:end], gradient, slice(first, end))
            for start in range(first, end, BLOCK):
                stop = min(start + BLOCK, end)
                before = values[start:stop].clone()
                self._reround_block(values[start:stop], gradient[start:stop].clone(), run, start, stop, cancel)
                gradient.addmm_(hessian[:, start:stop], values[start:stop] - before, alpha=-1)

    def _refit(self, run: int, values: Tensor, gradient: Tensor, here: slice) -> None:
        """The best scale of one group, codes as they are; rounding to fp16 may not make it worse."""
        hessian = self._problem.hessian
        steps = self.codes[here] - self.zeros[run]
        slope = (gradient[here] * steps).sum(0)
        curvature = ((hessian[here, here] @ steps) * steps).sum(0)
        change = as_stored(self.scales[run] + slope / curvature.clamp_min(1e-30)) - self.scales[run]
        better = (curvature > 0) & (change * (2 * slope - change * curvature) > 0)
        change = torch.where(better, change, 0)
        self.scales[run] += change
        difference = steps * change
        values += difference
        gradient.addmm_(hessian[:, here], difference, alpha=-1)

    def _reround_block(
        self, values: Tensor, gradient: Tensor, run: int, start: int, stop: int, cancel: CancelToken
    ) -> None:
        scale, zero, largest = self.scales[run], self.zeros[run], largest_code(self._problem.bits)
        hessian = self._problem.hessian[start:stop, start:stop]
        diagonal = hessian.diagonal().tolist()
        for i in range(stop - start):
            cancel.check()
            wanted = torch.add(values[i], gradient[i], alpha=1 / diagonal[i])
            code = wanted.div_(scale).round_().add_(zero).clamp_(0, largest)
            self.codes[start + i] = code
            value = code.sub_(zero).mul_(scale)
            gradient.addr_(hessian[i], value - values[i], alpha=-1)
            values[i] = value
