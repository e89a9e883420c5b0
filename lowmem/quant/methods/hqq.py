"""Half-quadratic quantization: the zero point of each group solved for, without calibration.

The published method (https://dropbox.github.io/hqq_blog) minimises |W - scale (q - zero)|_p with p = 0.7 over a real zero
point: codes, then the part of the error that the norm counts as outliers, then the zero point, in turns. Containers
store whole zero points, so both neighbours of the solution are tried, each with the scale that fits it best,
and the codes are chosen anew for what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.events import CancelToken
from lowmem.machine.hardware import Hardware
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.moments import Moments

NORM = 0.7
SHARPNESS = 10.0
"""The penalty that ties the split-off outliers to the error (beta in the paper)."""

REFITS = 3


@dataclass(frozen=True, slots=True)
class HqqOptions(base.Options):
    pass


class HalfQuadratic:
    name = "hqq"
    label = "HQQ"
    calibrated = False
    matrices = 0
    Options = HqqOptions

    def available(self, hardware: Hardware) -> str | None:  # noqa: ARG002  arithmetic that runs everywhere
        return None

    def quantize(
        self,
        weights: Sequence[Tensor],
        moments: Moments | None,  # noqa: ARG002
        options: HqqOptions,
        cancel: CancelToken,
    ) -> list[Quantized]:
        from lowmem.kernels.grid import quantize_rows

        def codes(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _solve(groups, options)

        return [quantize_rows(weight, options.bits, options.group_size, codes, cancel) for weight in weights]


def _solve(groups: Tensor, options: HqqOptions) -> tuple[Tensor, Tensor, Tensor]:
    """[..., group] -> codes, scales and whole zero points."""
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
    """The norm that the method minimises, [..., 1]."""
    from lowmem.kernels.grid import nearest

    error = nearest(groups, scale, zero, bits).sub_(zero).mul_(scale).sub_(groups)
    return error.abs_().pow_(NORM).sum(-1, keepdim=True)


def _zero_point(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The real zero points [..., 1] after one turn of the half-quadratic solver.

    The published 20 turns find no better whole ones (demo model at 2, 3 and 4 bits), and take most of the time.
    """
    from lowmem.kernels.grid import nearest

    codes = nearest(groups, scale, zero, bits)
    error = groups - (codes - zero) * scale
    size = error.abs().clamp_min_(1e-12)
    outliers = error.sign() * (size - size.pow(NORM - 1) / SHARPNESS).relu_()
    return (codes - (groups - outliers) / scale).mean(-1, keepdim=True)


METHOD = HalfQuadratic()
