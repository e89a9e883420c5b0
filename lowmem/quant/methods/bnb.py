"""bitsandbytes: LLM.int8 (arXiv 2208.07339), and NF4 or FP4 with double quantization (QLoRA, arXiv 2305.14314).

No calibration. Stored as bitsandbytes 0.50 serializes its layers, so that transformers loads the folder;
`kernels.bnb_linear` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.planning.precision import available
from lowmem.quant import base

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Packed
    from lowmem.quant.hessian import Hessian

TYPES = ("nf4", "fp4")
DTYPES = ("float16", "bfloat16", "float32")
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)

_STATE_BYTES = 180  # the description of 4-bit codes, some bytes more or less from layer to layer


@dataclass(frozen=True, slots=True)
class BnbOptions(base.Options):
    type: str = option(
        "nf4", msg("4-bit type"), msg("NF4 matches the distribution of weights better than FP4."), choices=TYPES
    )
    double: bool = option(True, msg("Double quantization"), msg("Quantize the scales too: saves 0.4 bits per weight."))
    compute: str = option(
        "float16", msg("Compute dtype"), msg("The dtype other programs will compute in."), choices=DTYPES
    )
    threshold: float = option(
        6.0,
        msg("Outlier threshold"),
        msg("LLM.int8 computes activations above it in half precision."),
        low=0.0,
        high=100.0,
    )

    def __post_init__(self) -> None:
        if self.bits == 8:  # LLM.int8 has one scale per row
            object.__setattr__(self, "group_size", -1)

    def check(self) -> None:
        if self.bits not in (4, 8):
            raise BadInput(msg("bitsandbytes has 4 and 8 bits, not {bits}.", bits=self.bits), msg("Use 4 or 8."))
        if self.bits == 4 and self.group_size not in BLOCKS:
            raise BadInput(
                msg("bitsandbytes has no groups of {group_size}.", group_size=self.group_size),
                msg("Use 64, 128, 256 or 512."),
            )
        if self.symmetric:
            raise BadInput(msg("bitsandbytes has no symmetric option."), msg("Turn symmetric off."))


class BitsAndBytes(base.Method):
    name = "bnb"
    label = "bitsandbytes"
    description = msg("NF4, FP4 or LLM.int8; made for GPUs, takes seconds.")
    config_file = False
    presets = ()  # the precisions nf4 and bnb8 are the same
    Options = BnbOptions

    def available(self, hardware: Hardware) -> str | None:
        return available("nf4", hardware)

    def quantize(
        self,
        weights: Sequence[Tensor],
        hessian: Hessian | None,  # noqa: ARG002
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

    def layer_bytes(self, rows: int, columns: int, options: BnbOptions) -> int:
        if options.bits == 8:
            return rows * (columns + 4) + 1
        blocks = math.ceil(rows * columns / options.group_size)
        scales = blocks + 4 * (math.ceil(blocks / 256) + 256) if options.double else 4 * blocks
        return math.ceil(rows * columns / 2) + scales + 4 * 16 + _STATE_BYTES

    def packing_bytes(self, options: BnbOptions) -> int:
        return 9 if options.bits == 4 else 3  # bitsandbytes works in fp32, and in fp16

    def config(self, options: BnbOptions) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": options.bits == 4,
            "load_in_8bit": options.bits == 8,
            "bnb_4bit_quant_type": options.type,
            "bnb_4bit_use_double_quant": options.double,
            "bnb_4bit_compute_dtype": options.compute,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": options.threshold,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": ["lm_head"],
        }

    def skipping(self, layers: Sequence[str]) -> dict[str, Any]:
        return {"llm_int8_skip_modules": ["lm_head", *layers]}


METHOD = BitsAndBytes()
