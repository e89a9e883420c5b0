"""GPTQ (arXiv 2210.17323): rounding whose errors are made up for by the weights not yet rounded."""

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

ORDERS = ("groups", "activation", "none")


@dataclass(frozen=True, slots=True)
class GptqOptions(base.Options):
    order: str = option(
        "groups",
        "Order of columns",
        "Important columns first: by whole groups, which keeps loading and running fast, or one by one (act-order).",
        choices=ORDERS,
    )
    damping: float = option(
        0.1,
        "Damping",
        "Share of each input's own energy that is added: more trusts the text less.",
        low=0.001,
        high=10.0,
    )
    search: bool = option(True, "Search the range", "Try smaller ranges for every group and refit its scale.")
    sweeps: int = option(
        3, "Sweeps", "Rounds of coordinate descent after the first solution; 0 is plain GPTQ.", low=0, high=20, step=1
    )
    balance: bool = option(
        False, "Balance channels", "Scale input channels against each other first, as AWQ does, where it costs nothing."
    )

    @property
    def balances(self) -> bool:
        return self.balance


class Gptq:
    name = "gptq"
    label = "GPTQ"
    calibrated = True
    matrices = 2  # second moments, and the factor of their inverse
    Options = GptqOptions

    def available(self, hardware: Hardware) -> str | None:  # noqa: ARG002  arithmetic that runs everywhere
        return None

    def quantize(
        self, weights: Sequence[Tensor], moments: Moments | None, options: GptqOptions, cancel: CancelToken
    ) -> list[Quantized]:
        from lowmem.quant.methods.gptq_solver import solve

        assert moments is not None, "a calibrated method was given no moments"
        return solve(
            weights,
            moments,
            bits=options.bits,
            group_size=options.group_size,
            symmetric=options.symmetric,
            order=options.order,
            damping=options.damping,
            search=options.search,
            sweeps=options.sweeps,
            cancel=cancel,
        )


METHOD = Gptq()
