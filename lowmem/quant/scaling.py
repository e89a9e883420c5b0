"""Activation-aware scaling, as in AWQ (arXiv 2306.00978): channels with large inputs get finer steps.

Columns of the weights are multiplied by one scale per input channel and the inputs divided by it, which changes no
output until the weights are rounded. The scales follow from the magnitudes of inputs and weights by one exponent, which
is searched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem.events import CancelToken
from lowmem.kernels.grid import fit, nearest
from lowmem.kernels.quantized import WHOLE_ROW
from lowmem.quant.base import RATIOS, SAMPLED_ROWS, Options
from lowmem.quant.hessian import Hessian


def channel_scales(weights: Sequence[Tensor], hessian: Hessian, options: Options, cancel: CancelToken) -> Tensor:
    """Scales fp32 [in] for weights [out, in] that share an input: multiply columns by them, divide inputs by them.

    All ones if no scales lower the error.

    Raises:
        Cancelled: within a second of Stop.
    """
    rows = torch.cat(list(weights))
    size = rows.shape[1] if options.group_size == WHOLE_ROW else options.group_size
    own = _magnitude(rows.float(), size)
    sample = rows[:: max(1, len(rows) // SAMPLED_ROWS)].float()
    best = torch.ones_like(own)
    least = _loss(sample, best, hessian, size, options)
    for step in range(RATIOS):
        cancel.check()
        scales = _scales(hessian.magnitude, own, step / RATIOS)
        loss = _loss(sample, scales, hessian, size, options)
        if loss < least:
            best, least = scales, loss
    return best


def _magnitude(rows: Tensor, size: int) -> Tensor:
    """Mean per channel, [in], of |w| relative to the largest in its group."""
    groups = rows.abs().unflatten(1, (-1, size))
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(1).mean(0)


def _scales(inputs: Tensor, weights: Tensor, ratio: float) -> Tensor:
    scales = (inputs**ratio / (weights ** (1 - ratio) + 1e-4)).clamp_min(1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    # Norms are stored in fp16: scales folded into them must not leave its range.
    return torch.where(scales.isfinite(), scales, 1.0).clamp(1e-3, 1e3)


def _loss(rows: Tensor, scales: Tensor, hessian: Hessian, size: int, options: Options) -> float:
    scaled = (rows * scales).unflatten(1, (-1, size))
    scale, zero = fit(scaled, options.bits, options.symmetric)
    rounded = nearest(scaled, scale, zero, options.bits).sub_(zero).mul_(scale).flatten(1)
    return hessian.output_error(rounded / scales - rows)
