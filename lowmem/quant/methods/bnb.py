"""bitsandbytes: LLM.int8 (arXiv 2208.07339), and NF4 or FP4 with double quantization (arXiv 2305.14314). No calibration.

Stored as bitsandbytes itself serializes its layers, so that transformers loads the folder; `bnb_linear` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.planning.precision import available
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Packed
    from lowmem.quant.moments import Moments

TYPES = ("nf4", "fp4")
DTYPES = ("float16", "bfloat16", "float32")
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class BnbOptions(base.Options):
    type: str = option("nf4", "Type of 4 bits", "NF4 suits weights better than FP4.", choices=TYPES)
    double: bool = option(True, "Double quantization", "Scales are quantized, too: 0.4 bits a weight less.")
    compute: str = option("float16", "Compute dtype", "What other programs are told to compute in.", choices=DTYPES)
    threshold: float = option(
        6.0, "Outlier threshold", "LLM.int8 computes activations above it in half precision.", low=0.0, high=100.0
    )

    def __post_init__(self) -> None:
        if self.bits == 8:  # LLM.int8 has one scale a row
            object.__setattr__(self, "group_size", -1)

    @property
    def layout(self) -> str:
        return base.BNB

    def check(self) -> None:
        if self.bits not in (4, 8):
            raise BadInput(f"bitsandbytes has 4 and 8 bits, not {self.bits}.", "Use 4 or 8.")
        if self.bits == 4 and self.group_size not in BLOCKS:
            raise BadInput(f"bitsandbytes has no groups of {self.group_size}.", "Use 64, 128, 256 or 512.")
        if self.symmetric:
            raise BadInput("bitsandbytes has codes of its own, not symmetric ones.", "Leave symmetric off.")


class BitsAndBytes:
    name = "bnb"
    label = "bitsandbytes"
    calibrated = False
    matrices = 0
    Options = BnbOptions

    def available(self, hardware: Hardware) -> str | None:
        return available("nf4", hardware)

    def quantize(
        self,
        weights: Sequence[Tensor],
        moments: Moments | None,  # noqa: ARG002
        options: BnbOptions,
        cancel: CancelToken,
    ) -> list[Packed]:
        from lowmem.kernels.bnb_linear import packed4, packed8

        def packed(weight: Tensor) -> Packed:
            cancel.check()
            if options.bits == 8:
                return packed8(weight)
            return packed4(weight, options.group_size, options.type, options.double, options.compute)

        return [packed(weight) for weight in weights]


METHOD = BitsAndBytes()
