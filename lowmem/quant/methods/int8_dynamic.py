"""Dynamic int8 (W8A8): one scale per output channel for weights, one per token for activations. No calibration.

Stored as compressed-tensors' "int-quantized", which vLLM reads too; `kernels.int8_linear` runs it. Codes stay in the
range that this processor multiplies exactly, so that a stored model equals one loaded in int8.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.device import CPU
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.planning.precision import available
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Packed
    from lowmem.quant.hessian import Hessian


@dataclass(frozen=True, slots=True)
class Int8Options(base.Options):
    bits: int = option(8, msg("Bits"), msg("Dynamic int8 has 8 bits."), low=8, high=8, step=1)
    group_size: int = option(
        -1, msg("Group size"), msg("Dynamic int8 has one scale per row: -1."), low=-1, high=-1, step=1
    )
    symmetric: bool = option(True, msg("Symmetric"), msg("Dynamic int8 has no zero points."))

    def check(self) -> None:
        if not self.symmetric:
            raise BadInput(msg("Dynamic int8 has no zero points."), msg("Turn symmetric on, or choose another method."))


class Int8Dynamic(base.Method):
    name = "int8_dynamic"
    label = msg("Dynamic int8")
    description = msg("8-bit, fast on CPUs; no calibration, takes seconds.")
    config_file = False
    presets = ()  # the precision int8 is the same
    Options = Int8Options

    def available(self, hardware: Hardware) -> str | None:
        return available("int8", hardware, CPU)

    def quantize(
        self,
        weights: Sequence[Tensor],
        hessian: Hessian | None,  # noqa: ARG002
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

    def layer_bytes(self, rows: int, columns: int, options: Int8Options) -> int:  # noqa: ARG002
        return rows * (columns + 4)

    def packing_bytes(self, options: Int8Options) -> int:  # noqa: ARG002
        return 1

    def config(self, options: Int8Options) -> dict[str, Any]:  # noqa: ARG002
        scheme = {"num_bits": 8, "type": "int", "symmetric": True}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": scheme | {"strategy": "channel", "dynamic": False},
                    "input_activations": scheme | {"strategy": "token", "dynamic": True},
                }
            },
            "ignore": ["lm_head"],
        }

    def skipping(self, layers: Sequence[str]) -> dict[str, Any]:
        return {"ignore": ["lm_head", *(rf"re:.*\.{re.escape(layer)}$" for layer in layers)]}


METHOD = Int8Dynamic()
