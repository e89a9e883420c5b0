"""The GPTQ solver (arXiv 2210.17323): quantizes column by column, compensating each error in the columns that follow.

For inputs with Hessian H the columns are quantized in some order; the Cholesky factor of H^-1 gives the correction of the
remaining columns that cancels most of each rounding error. Three differences from the published code:

- A group's grid is fitted when its turn comes, to weights that carry all corrections so far. The published code applies
  them at the end of blocks of 128 columns, so smaller groups are fitted to stale weights.
- The fit weighs each column's error by the part that later columns cannot compensate (1 / U_jj^2).
- Sweeps of coordinate descent on the same objective follow: each scale is refitted, each code rounded again given all
  others.

Matrices are transposed, [in, rows], so that a column of weights is contiguous in memory.
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
from lowmem.quant.hessian import Hessian

BLOCK = 128
"""Columns whose corrections are applied to the rest in one matrix product."""

FLOOR = 1e-3
"""Dampening relative to the mean of H's diagonal, for inputs that are always 0 on the calibration text."""

_MOST_DAMPENING = 1e3


@dataclass(frozen=True, slots=True)
class Problem:
    """What all rows of the weights share, with columns in the order in which they are quantized.

    Args:
        order: int64 [in], the column at each position.
        runs: the stored group of each run of `size` positions.
        hessian: dampened, [in, in].
        added: the dampening of its diagonal, [in].
        factor: upper triangular U with U^T U = hessian^-1.
    """

    order: Tensor
    runs: Tensor
    size: int
    hessian: Tensor
    added: Tensor
    factor: Tensor
    bits: int
    symmetric: bool
    search: bool
    sweeps: int

    def output_error(self, change: Tensor) -> float:
        """`Hessian.output_error` of a change [in, rows] of the weights, without the dampening."""
        added = (change.square().sum(1) * self.added).sum(dtype=torch.float64)
        return float(((self.hessian @ change) * change).sum(dtype=torch.float64) - added)


def solve(
    weights: Sequence[Tensor],
    hessian: Hessian,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    order: str,
    dampening: float,
    search: bool,
    sweeps: int,
    cancel: CancelToken,
) -> list[Quantized]:
    """Quantize weights [out, in] that share the inputs described by `hessian`, which is overwritten.

    Args:
        order: "groups" sorts groups, and columns within each, by decreasing importance; "activation" sorts all columns
            and forms groups in that order; "none" keeps the order.
        dampening: share of H's diagonal that is added to it.
        search: try smaller ranges for each group.
        sweeps: passes of coordinate descent.

    Raises:
        Cancelled: within a second of Stop.
    """
    columns = hessian.matrix.shape[0]
    size = columns if group_size == WHOLE_ROW else group_size
    permutation, runs, groups = _order(hessian.matrix.diagonal(), size, order)
    if order != "none":
        hessian.reorder(permutation)
    added, factor = _factorize(hessian.matrix, dampening, cancel)
    problem = Problem(permutation, runs, size, hessian.matrix, added, factor, bits, symmetric, search, sweeps)
    return [_quantize(weight, problem, groups, cancel) for weight in weights]


def _order(importance: Tensor, size: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """(order, runs) as in `Problem`, and the stored group of each input.

    "groups" is the group-aware reordering of arXiv 2505.14638: nearly as accurate as "activation", and groups stay
    consecutive, as fast kernels require.
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


def _factorize(hessian: Tensor, dampening: float, cancel: CancelToken) -> tuple[Tensor, Tensor]:
    """Dampen H until it is positive definite in fp32: what was added to its diagonal, and the factor U."""
    diagonal = hessian.diagonal().clone()
    floor = FLOOR * float(diagonal.mean()) or 1.0
    threads = torch.get_num_threads()

    def solve() -> Tensor | None:
        torch.set_num_threads(threads)  # in the thread that Stop interrupts
        return inverse_factor(hessian)

    while True:
        hessian.diagonal().copy_(diagonal * (1 + dampening) + floor)
        factor = stoppable(solve, cancel)
        if factor is not None or dampening > _MOST_DAMPENING:
            break
        dampening = max(2 * dampening, 0.01)
        floor *= 2
    if factor is None:  # so ill-conditioned that only the diagonal can be trusted
        factor = hessian.diagonal().rsqrt().diag()
    return hessian.diagonal() - diagonal, factor


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper triangular U with U^T U = hessian^-1; None unless it is positive definite in fp32."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        return None
    # In place: with 11,008 inputs, as in a 7B model, each further matrix would take half a gigabyte.
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
        error += problem.output_error(state.values() - target)
        size += problem.output_error(target)
    return Quantized(codes, scales, zeros, groups, problem.bits, error / max(size, 1e-30))


class _Rows:
    """Some rows of one weight being quantized: `target` fp32 [in, rows]; scales and zeros fp32 [runs, rows]."""

    def __init__(self, target: Tensor, problem: Problem) -> None:
        self._target, self._problem = target, problem
        columns, rows = target.shape
        self.codes = torch.empty_like(target)
        self.scales = target.new_empty(columns // problem.size, rows)
        self.zeros = torch.empty_like(self.scales)

    def values(self) -> Tensor:
        """The dequantized weights, [in, rows]."""
        steps = self.codes.view(-1, self._problem.size, self.codes.shape[1]) - self.zeros[:, None]
        return (steps * self.scales[:, None]).flatten(0, 1)

    def round_columns(self, cancel: CancelToken) -> None:
        """Round every column in order, compensating its error in the columns that follow."""
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
        """Round columns [start, stop), compensating errors within the block; returns the errors [stop - start, rows]."""
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
        """One sweep of coordinate descent over all scales and codes; the error never increases."""
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
        """Refit the scale of one group with its codes fixed, unless rounding it to fp16 would increase the error."""
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
