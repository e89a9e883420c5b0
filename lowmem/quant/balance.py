"""AWQ's search for channel scales (arXiv 2306.00978): channels with large inputs get finer steps.

Weights are multiplied and inputs divided by one factor a channel, which changes no output until the weights are
rounded. The factors follow from the inputs' magnitude and the weights' own, by one exponent that is searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem.events import CancelToken
from lowmem.kernels.grid import fit, nearest
from lowmem.kernels.quantized import WHOLE_ROW
from lowmem.quant.base import Options
from lowmem.quant.moments import Moments

RATIOS = 20

SAMPLED_ROWS = 1024
"""Rows that the search looks at, spread over all weights."""


def channel_factors(weights: Sequence[Tensor], moments: Moments, options: Options, cancel: CancelToken) -> Tensor:
    """Factors fp32 [in] for weights that share an input: multiply columns by them, divide inputs by them.

    All ones when nothing is better than leaving the channels as they are.
    """
    rows = torch.cat(list(weights))
    size = rows.shape[1] if options.group_size == WHOLE_ROW else options.group_size
    own = _magnitude(rows.float(), size)
    sample = rows[:: max(1, len(rows) // SAMPLED_ROWS)].float()
    best = torch.ones_like(own)
    least = _loss(sample, best, moments, size, options)
    for step in range(RATIOS):
        cancel.check()
        factors = _factors(moments.magnitude, own, step / RATIOS)
        loss = _loss(sample, factors, moments, size, options)
        if loss < least:
            best, least = factors, loss
    return best


def _magnitude(rows: Tensor, size: int) -> Tensor:
    """Mean of |w| relative to the largest of its group, per channel: [in]."""
    groups = rows.abs().unflatten(1, (-1, size))
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def _factors(inputs: Tensor, weights: Tensor, ratio: float) -> Tensor:
    factors = (inputs**ratio / (weights ** (1 - ratio) + 1e-4)).clamp_min(1e-4)
    factors = factors / (factors.max() * factors.min()).sqrt()
    # Stored norms are fp16: what is folded into them must not leave its range.
    return torch.where(factors.isfinite(), factors, 1.0).clamp(1e-3, 1e3)


def _loss(rows: Tensor, factors: Tensor, moments: Moments, size: int, options: Options) -> float:
    scaled = (rows * factors).unflatten(1, (-1, size))
    scale, zero = fit(scaled, options.bits, options.symmetric)
    rounded = nearest(scaled, scale, zero, options.bits).sub_(zero).mul_(scale).flatten(1)
    return moments.cost(rounded / factors - rows)
