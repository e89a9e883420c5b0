"""Integer grids: how a group of weights becomes codes with one scale and one zero point.

Scales are rounded to fp16 before any code is chosen, since fp16 is what every container stores.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowmem.events import CancelToken
from lowmem.kernels.quantized import Quantized, consecutive, largest_code, row_slices

SEARCH_STEPS = 16
"""Ranges tried per group, from the full one down to `SMALLEST_RANGE` of it."""

SMALLEST_RANGE = 0.3

CLOSE_STEPS, CLOSE_RANGE = 10, 0.65
"""Number of ranges that `fit_closely` tries, and the smallest as a share of the full range."""

REFITS = 2
"""Least-squares fits of the scale after the search; more hardly change it."""

Choice = tuple[Tensor, Tensor, Tensor]
"""Scale, zero point and cost of every group, [..., 1] each."""

_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-24, 65504.0  # of fp16


def fit(
    weight: Tensor, bits: int, symmetric: bool, importance: Tensor | None = None, search: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group: fp32 [..., 1] each, scales already rounded to fp16.

    Args:
        weight: [..., group] fp32, one group a row.
        importance: what errors cost: [group] for squares weighted one by one, [group, group] for a
            quadratic form; squares as they are when None.
        search: also try smaller ranges, which clip the largest weights to gain resolution for the others,
            then the scale that suits the codes best, and keep what costs least.
    """
    low = weight.amin(-1, keepdim=True).clamp_(max=0)
    high = weight.amax(-1, keepdim=True).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero = _grid(low, high, bits, symmetric)
    if not search:
        return scale, zero
    best = squared_error(weight, scale, zero, bits, importance)
    for step in range(1, SEARCH_STEPS + 1):
        share = 1 - (1 - SMALLEST_RANGE) * step / SEARCH_STEPS
        tried = _grid(low * share, high * share, bits, symmetric)
        scale, zero, best = keep_better((scale, zero, best), (*tried, squared_error(weight, *tried, bits, importance)))
    for _ in range(REFITS):
        tried = refit(weight, nearest(weight, scale, zero, bits).sub_(zero), scale, importance), zero
        scale, zero, best = keep_better((scale, zero, best), (*tried, squared_error(weight, *tried, bits, importance)))
    return scale, zero


def fit_closely(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Like `fit`, but minimizes the squared error by a finer search that also tries the neighbors of each zero point.

    Rounding the zero point to a code shifts the range by up to half a step, and often a neighbor fits the weights better.
    """
    low = weight.amin(-1, keepdim=True).clamp_(max=0)
    high = weight.amax(-1, keepdim=True).clamp_(min=0)
    scale, zero = _grid(low, high, bits, symmetric=False)
    best: Choice = scale, zero, squared_error(weight, scale, zero, bits)
    for step in range(CLOSE_STEPS + 1):
        share = 1 - (1 - CLOSE_RANGE) * step / CLOSE_STEPS
        scale, zero = _grid(low * share, high * share, bits, symmetric=False)
        for shift in (-1, 0, 1):
            beside = (zero + shift).clamp_(0, largest_code(bits))
            best = keep_better(best, (scale, beside, squared_error(weight, scale, beside, bits)))
    for _ in range(REFITS):
        scale, zero, _cost = best
        scale = refit(weight, nearest(weight, scale, zero, bits).sub_(zero), scale)
        best = keep_better(best, (scale, zero, squared_error(weight, scale, zero, bits)))
    return best[0], best[1]


def refit(weight: Tensor, steps: Tensor, scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """The least-squares scale for codes that are `steps` above their zero point.

    Where a group has no code off its zero point, `scale` stays.
    """
    weighted = _weighted(steps, importance)
    square = (weighted * steps).sum(-1, keepdim=True)
    best = (weighted * weight).sum(-1, keepdim=True) / square
    return torch.where((square > 0) & (best > 0), as_stored(best), scale)


def _grid(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = as_stored((high - low) / largest_code(bits))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, (-low / scale).round_().clamp_(0, largest_code(bits))


def as_stored(scale: Tensor) -> Tensor:
    """fp32 scales that fp16 holds exactly, none of them zero or infinite."""
    return scale.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().float()


def keep_better(old: Choice, new: Choice) -> Choice:
    """The cheaper of two choices, group by group."""
    lower = new[2] < old[2]
    scale, zero, cost = (torch.where(lower, after, before) for before, after in zip(old, new, strict=True))
    return scale, zero, cost


def squared_error(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Squared error of rounding `weight` [..., group] to this grid: [..., 1]; `importance` as in `fit`."""
    error = nearest(weight, scale, zero, bits).sub_(zero).mul_(scale).sub_(weight)
    return (_weighted(error, importance) * error).sum(-1, keepdim=True)


def _weighted(rows: Tensor, importance: Tensor | None) -> Tensor:
    if importance is None:
        return rows
    return rows * importance if importance.dim() == 1 else rows @ importance


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes nearest to `weight`, as fp32; all arguments broadcast."""
    return (weight / scale).round_().add_(zero).clamp_(0, largest_code(bits))


def quantize_rows(
    weight: Tensor, bits: int, group_size: int, choose: Callable[[Tensor], Choice], cancel: CancelToken
) -> Quantized:
    """Quantize a matrix [out, in] of any float dtype, a chunk of rows at a time.

    `choose` gets fp32 [rows, groups, group] and returns codes of that shape, scales and zeros [rows, groups, 1].
    """
    rows, columns = weight.shape
    groups = consecutive(columns, group_size, weight.device)
    count = int(groups[-1]) + 1
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, count, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(rows, count, dtype=torch.uint8, device=weight.device)
    error = size = 0.0
    for here in row_slices(rows, columns):
        cancel.check()
        original = weight[here].float().unflatten(1, (count, -1))
        chosen, scale, zero = choose(original)
        codes[here] = chosen.flatten(1)
        scales[here], zeros[here] = scale.squeeze(-1), zero.squeeze(-1)
        error += float(chosen.sub_(zero).mul_(scale).sub_(original).square_().sum())
        size += float(original.square().sum())
    return Quantized(codes, scales, zeros, groups, bits, error / max(size, 1e-30))
