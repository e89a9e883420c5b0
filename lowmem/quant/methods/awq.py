"""AWQ (arXiv 2306.00978): activation-aware scaling (see `scaling.py`), clipped ranges, then round to nearest.

The published search compares outputs of whole modules on sampled tokens; here both searches use the Hessian, which holds
the same information about a linear layer for all tokens. Stored as AutoAWQ stores it ("gemm"), which has 4 bits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.messages import msg
from lowmem.quant import base
from lowmem.quant.card import vllm
from lowmem.quant.gptq_format import packed_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.kernels.quantized import Quantized
    from lowmem.quant.hessian import Hessian


@dataclass(frozen=True, slots=True)
class AwqOptions(base.Options):
    scale_channels: bool = option(
        True,
        msg("Activation-aware scaling"),
        msg("First scale input channels by their activations."),
        aliases=("balance",),
    )
    clip: bool = option(
        True, msg("Clip"), msg("Try smaller ranges for every group and keep the one that changes outputs least.")
    )

    def check(self) -> None:
        base.Options.check(self)
        if self.bits != 4:
            raise BadInput(
                msg("AWQ stores 4 bits, not {bits}.", bits=self.bits), msg("Use 4 bits, or GPTQ for other bit widths.")
            )


class Awq(base.Method):
    name = "awq"
    label = "AWQ"
    description = msg("Protects the most active channels, 4-bit only; needs calibration text, takes minutes.")
    calibrated = True
    matrices = 2  # the Hessian, and its product with the weights
    Options = AwqOptions

    def quantize(
        self, weights: Sequence[Tensor], hessian: Hessian | None, options: AwqOptions, cancel: CancelToken
    ) -> list[Quantized]:
        from lowmem.quant.methods.awq_solver import quantize_clipped

        assert hessian is not None, "a calibrated method needs a Hessian"
        return [quantize_clipped(weight, hessian, options, options.clip, cancel) for weight in weights]

    def products(self, options: AwqOptions) -> float:  # noqa: ARG002
        return 2.0  # for the error of the result

    def layer_tensors(self, weight: Quantized, options: AwqOptions) -> dict[str, Tensor]:  # noqa: ARG002
        from lowmem.kernels.packing import to_awq

        return to_awq(weight)

    def layer_bytes(self, rows: int, columns: int, options: AwqOptions) -> int:
        return packed_bytes(rows, columns, options.bits, options.group_size)

    def config(self, options: AwqOptions) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": options.bits,
            "group_size": options.group_size,
            "zero_point": not options.symmetric,
            "version": "gemm",
            "modules_to_not_convert": None,
            "meta": self.meta(options),
        }

    def skipping(self, layers: Sequence[str]) -> dict[str, Any]:
        return {"modules_to_not_convert": list(layers)}

    def serving(self, options: AwqOptions) -> str:
        return vllm(options.group_size)


METHOD = Awq()
