"""Round to nearest: every weight becomes the closest code of its group's range. No calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.moments import Moments


@dataclass(frozen=True, slots=True)
class RtnOptions(base.Options):
    search: bool = option(
        False, "Search the range", "Try smaller ranges too and keep the one with the least squared error: slower."
    )


class RoundToNearest:
    name = "rtn"
    label = "Round to nearest"
    calibrated = False
    matrices = 0
    Options = RtnOptions

    def available(self, hardware: Hardware) -> str | None:  # noqa: ARG002  arithmetic that runs everywhere
        return None

    def quantize(
        self,
        weights: Sequence[Tensor],
        moments: Moments | None,  # noqa: ARG002
        options: RtnOptions,
        cancel: CancelToken,
    ) -> list[Quantized]:
        from lowmem.kernels.grid import fit, nearest, quantize_rows

        def codes(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero = fit(groups, options.bits, options.symmetric, search=options.search)
            return nearest(groups, scale, zero, options.bits), scale, zero

        return [quantize_rows(weight, options.bits, options.group_size, codes, cancel) for weight in weights]


METHOD = RoundToNearest()
