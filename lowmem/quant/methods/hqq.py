"""Half-quadratic quantization (https://dropbox.github.io/hqq_blog): optimizes each group's zero point. No calibration.

The published method minimizes |W - scale (q - zero)|_p with p = 0.7 over a real zero point, alternating between codes,
outliers (the part of the error that the norm discounts) and zero point. GPTQ's format stores integer zero points, so
both neighbors of the solution are tried, each with the scale that fits it best, and the codes are rounded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.quant import base
from lowmem.quant.gptq_format import GptqFormat

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.hessian import Hessian

NORM = 0.7
"""p of the norm that is minimized."""

PENALTY = 10.0
"""Weight of the term that ties the outliers to the error (beta in the publication)."""

REFITS = 3


class HalfQuadratic(GptqFormat):
    name = "hqq"
    label = "HQQ"
    description = msg("Better than round to nearest; no calibration, takes seconds.")
    Options = base.Options

    def quantize(
        self,
        weights: Sequence[Tensor],
        hessian: Hessian | None,  # noqa: ARG002
        options: base.Options,
        cancel: CancelToken,
    ) -> list[Quantized]:
        from lowmem.kernels.grid import quantize_rows

        def codes(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _solve(groups, options)

        return [quantize_rows(weight, options.bits, options.group_size, codes, cancel) for weight in weights]


def _solve(groups: Tensor, options: base.Options) -> tuple[Tensor, Tensor, Tensor]:
    """Groups [..., group_size] -> codes, scales [..., 1] and integer zero points [..., 1]."""
    from lowmem.kernels.grid import fit, keep_better, nearest, refit

    scale, zero = fit(groups, options.bits, options.symmetric)
    if options.symmetric:
        candidates = [zero]
    else:
        solved = _zero_point(groups, scale, zero, options.bits)
        largest = 2**options.bits - 1
        candidates = [solved.floor().clamp_(0, largest), solved.ceil().clamp_(0, largest)]
    best = scale, zero, _cost(groups, scale, zero, options.bits)
    for tried in candidates:
        fitted = scale
        for _ in range(REFITS):
            fitted = refit(groups, nearest(groups, fitted, tried, options.bits).sub_(tried), fitted)
        best = keep_better(best, (fitted, tried, _cost(groups, fitted, tried, options.bits)))
    scale, zero, _ = best
    return nearest(groups, scale, zero, options.bits), scale, zero


def _cost(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """|W - scale (q - zero)|_p to the power p, per group: [..., 1]."""
    from lowmem.kernels.grid import nearest

    error = nearest(groups, scale, zero, bits).sub_(zero).mul_(scale).sub_(groups)
    return error.abs_().pow_(NORM).sum(-1, keepdim=True)


def _zero_point(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The real zero points [..., 1] after one iteration of the half-quadratic solver.

    The 20 published iterations find no better integers (demo model at 2, 3 and 4 bits) and take most of the time.
    """
    from lowmem.kernels.grid import nearest

    codes = nearest(groups, scale, zero, bits)
    error = groups - (codes - zero) * scale
    size = error.abs().clamp_min_(1e-12)
    outliers = error.sign() * (size - size.pow(NORM - 1) / PENALTY).relu_()
    return (codes - (groups - outliers) / scale).mean(-1, keepdim=True)


METHOD = HalfQuadratic()
