"""Half precision for GPUs."""

from __future__ import annotations

from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision


class Fp16(Precision):
    def refusal(self, device: Device) -> str | None:
        if device.kind == "cpu":  # torch has no fast CPU kernels for it
            return msg("fp16 is slow and imprecise on CPUs; use bf16 or int8.")
        return super().refusal(device)


PRECISION = Fp16("fp16", msg("fp16 (half precision)"), dtype="fp16")
