"""Round to nearest: every weight becomes the closest point of its group's grid. No calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.messages import msg
from lowmem.quant import base
from lowmem.quant.gptq_format import GptqFormat

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.hessian import Hessian


@dataclass(frozen=True, slots=True)
class RtnOptions(base.Options):
    search: bool = option(
        False,
        msg("Search the range"),
        msg("Also try smaller ranges and keep the one with the least squared error; slower."),
    )


class RoundToNearest(GptqFormat):
    name = "rtn"
    label = msg("Round to nearest")
    description = msg("Simplest; no calibration, takes seconds.")
    Options = RtnOptions

    def quantize(
        self,
        weights: Sequence[Tensor],
        hessian: Hessian | None,  # noqa: ARG002
        options: RtnOptions,
        cancel: CancelToken,
    ) -> list[Quantized]:
        from lowmem.kernels.grid import fit, nearest, quantize_rows

        def codes(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            scale, zero = fit(groups, options.bits, options.symmetric, search=options.search)
            return nearest(groups, scale, zero, options.bits), scale, zero

        return [quantize_rows(weight, options.bits, options.group_size, codes, cancel) for weight in weights]


METHOD = RoundToNearest()
