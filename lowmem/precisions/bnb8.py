"""LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.kernels import layouts
from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class BitsAndBytes(Precision):
    """What both precisions of bitsandbytes share.

    Args:
        least_capability: the least CUDA compute capability whose GPUs bitsandbytes supports in this precision
            (https://huggingface.co/docs/bitsandbytes/v0.50.0/installation).
    """

    least_capability: tuple[int, ...] = (6, 0)

    def refusal(self, device: Device) -> str | None:
        if device.kind == "mps":
            return msg("bitsandbytes does not support Apple GPUs.")
        if device.capability and device.capability < self.least_capability:
            return msg(
                "{key} needs compute capability {least}, {device} has {version}.",
                key=self.key,
                least=".".join(map(str, self.least_capability)),
                device=device.name,
                version=".".join(map(str, device.capability)),
            )
        if device.rates is None and importlib.util.find_spec("bitsandbytes") is None:
            return msg("bitsandbytes is not installed: pip install bitsandbytes.")
        return None


class Bnb8(BitsAndBytes):
    def rank(self, device: Device) -> int | None:
        return 1 if device.kind == "cuda" else None

    def quantizes(self, inputs: int) -> bool:  # noqa: ARG002
        return True

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        return layouts.bnb8_bytes(outputs, inputs)

    def linear(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        from lowmem.kernels.bnb_linear import linear8

        return linear8(weight.contiguous(), bias, device, dtype)


PRECISION = Bnb8("bnb8", msg("8-bit (bitsandbytes LLM.int8)"), least_capability=(7, 5))
