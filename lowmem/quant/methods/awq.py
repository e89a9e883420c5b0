"""AWQ (arXiv 2306.00978): channels balanced by their inputs (see `balance.py`), ranges clipped, then nearest codes.

The published search compares outputs of whole modules on sampled tokens; here both searches use the inputs' second
moments, which hold the same information about a linear layer for all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.moments import Moments


@dataclass(frozen=True, slots=True)
class AwqOptions(base.Options):
    balance: bool = option(True, "Balance channels", "Scale input channels against each other first.")
    clip: bool = option(True, "Clip", "Try smaller ranges for every group and keep what changes its outputs least.")

    @property
    def layout(self) -> str:
        return "awq"

    @property
    def balances(self) -> bool:
        return self.balance

    def check(self) -> None:
        base.Options.check(self)
        if self.bits != 4:
            raise BadInput(f"AWQ's files hold 4 bits, not {self.bits}.", "Use 4 bits, or GPTQ for other widths.")


class Awq:
    name = "awq"
    label = "AWQ"
    calibrated = True
    matrices = 2  # second moments, and their product with the weights
    Options = AwqOptions

    def available(self, hardware: Hardware) -> str | None:  # noqa: ARG002  arithmetic that runs everywhere
        return None

    def quantize(
        self, weights: Sequence[Tensor], moments: Moments | None, options: AwqOptions, cancel: CancelToken
    ) -> list[Quantized]:
        from lowmem.quant.methods.awq_solver import quantize_clipped

        assert moments is not None, "a calibrated method was given no moments"
        return [quantize_clipped(weight, moments, options, options.clip, cancel) for weight in weights]


METHOD = Awq()
