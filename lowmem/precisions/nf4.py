"""NF4 with double quantization (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem.kernels import layouts
from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.bnb8 import BitsAndBytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class Nf4(BitsAndBytes):
    def rank(self, device: Device) -> int | None:
        """Last: on CPUs bitsandbytes saves memory, but is many times slower than int8."""
        return {"cpu": 3, "cuda": 2}.get(device.kind)

    def quantizes(self, inputs: int) -> bool:
        """bitsandbytes 0.50 dequantizes blocks that cross the end of a row wrongly on CPUs, so such layers stay dense."""
        return inputs % layouts.NF4_BLOCK == 0

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        return layouts.nf4_bytes(outputs, inputs)

    def linear(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from lowmem.kernels.bnb_linear import linear4

        return linear4(weight.contiguous(), bias, device, dtype)


PRECISION = Nf4("nf4", msg("4-bit (bitsandbytes NF4)"))
