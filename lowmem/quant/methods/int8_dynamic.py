"""Dynamic int8: a scale per output channel for weights, one per token for activations. No calibration.

Stored as compressed-tensors' "int-quantized" (W8A8), which vLLM reads too; `int8_linear` runs it. Codes keep to the range
that the processor of the making computes exactly, so that here a stored model is the one that loading in int8 gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.device import CPU
from lowmem.machine.hardware import Hardware
from lowmem.planning.precision import available
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Packed
    from lowmem.quant.moments import Moments


@dataclass(frozen=True, slots=True)
class Int8Options(base.Options):
    bits: int = option(8, "Bits", "Dynamic int8 has 8.", low=8, high=8, step=1)
    group_size: int = option(-1, "Group size", "Dynamic int8 has one scale a row: -1.", low=-1, high=-1, step=1)
    symmetric: bool = option(True, "Symmetric", "Dynamic int8 has no zero points.")

    @property
    def layout(self) -> str:
        return base.INT8

    def check(self) -> None:
        if not self.symmetric:
            raise BadInput("Dynamic int8 has no zero points.", "Choose symmetric, or another method.")


class Int8Dynamic:
    name = "int8_dynamic"
    label = "Dynamic int8"
    calibrated = False
    matrices = 0
    Options = Int8Options

    def available(self, hardware: Hardware) -> str | None:
        return available("int8", hardware, CPU)

    def quantize(
        self,
        weights: Sequence[Tensor],
        moments: Moments | None,  # noqa: ARG002
        options: Int8Options,  # noqa: ARG002
        cancel: CancelToken,
    ) -> list[Packed]:
        from lowmem.kernels.int8_linear import largest_code, quantize_rows
        from lowmem.kernels.quantized import Packed, relative_loss

        def packed(weight: Tensor) -> Packed:
            cancel.check()
            codes, scales = quantize_rows(weight, largest_code())
            loss = relative_loss(weight, lambda rows: codes[rows].float() * scales[rows, None])
            return Packed({"weight": codes, "weight_scale": scales[:, None]}, loss)

        return [packed(weight) for weight in weights]


METHOD = Int8Dynamic()
