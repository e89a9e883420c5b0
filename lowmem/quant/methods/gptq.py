"""GPTQ (arXiv 2210.17323): rounds column by column and corrects the remaining weights for each rounding error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.messages import msg
from lowmem.quant import base
from lowmem.quant.gptq_format import GptqFormat

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.hessian import Hessian

ORDERS = ("groups", "activation", "none")


@dataclass(frozen=True, slots=True)
class GptqOptions(base.Options):
    order: str = option(
        "groups",
        msg("Column order"),
        msg("Most important columns first: in whole groups, which keeps inference fast, or one by one (act-order)."),
        choices=ORDERS,
    )
    dampening: float = option(
        0.1,
        msg("Dampening"),
        msg("Share of the Hessian's diagonal that is added to it: more relies less on the calibration text."),
        low=0.001,
        high=10.0,
        aliases=("damping",),
    )
    search: bool = option(True, msg("Search the range"), msg("Try smaller ranges for every group and refit its scale."))
    sweeps: int = option(
        3,
        msg("Sweeps"),
        msg("Passes of coordinate descent after GPTQ's own solution; 0 is plain GPTQ."),
        low=0,
        high=20,
        step=1,
    )
    scale_channels: bool = option(
        False,
        msg("Activation-aware scaling"),
        msg("First scale input channels by their activations, as AWQ does, where the layer before can absorb it."),
        aliases=("balance",),
    )


class Gptq(GptqFormat):
    name = "gptq"
    label = "GPTQ"
    description = msg("Best quality; needs calibration text, takes minutes.")
    calibrated = True
    matrices = 2  # the Hessian, and the Cholesky factor of its inverse
    presets = ("gptq:4:64", "gptq:3:64", "gptq:8:64")
    Options = GptqOptions

    def quantize(
        self, weights: Sequence[Tensor], hessian: Hessian | None, options: GptqOptions, cancel: CancelToken
    ) -> list[Quantized]:
        from lowmem.quant.methods.gptq_solver import solve

        assert hessian is not None, "a calibrated method needs a Hessian"
        return solve(
            weights,
            hessian,
            bits=options.bits,
            group_size=options.group_size,
            symmetric=options.symmetric,
            order=options.order,
            dampening=options.dampening,
            search=options.search,
            sweeps=options.sweeps,
            cancel=cancel,
        )

    def products(self, options: GptqOptions) -> float:
        # Corrections of later columns are half a product, errors two; a sweep starts with a gradient and corrects it twice.
        return 2.5 + 3 * options.sweeps

    def config(self, options: GptqOptions) -> dict[str, Any]:
        act_order = options.order == "activation"
        return super().config(options) | {"desc_act": act_order, "damp_percent": options.dampening}


METHOD = Gptq()
