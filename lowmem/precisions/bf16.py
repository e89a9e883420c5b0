"""Half precision with the range of fp32. It halves the memory even on CPUs without bf16 instructions, where it is slow."""

from __future__ import annotations

from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision


class Bf16(Precision):
    def refusal(self, device: Device) -> str | None:
        if device.kind == "cpu":
            return None
        if device.capability and "bf16" not in device.dtypes:
            return msg(
                "{device} does not support bf16: it needs compute capability 8.0, this GPU has {version}.",
                device=device.name,
                version=".".join(map(str, device.capability)),
            )
        return super().refusal(device)

    def rank(self, device: Device) -> int | None:
        return 1 if device.kind == "cpu" else super().rank(device)


PRECISION = Bf16("bf16", msg("bf16 (half precision)"), dtype="bf16")
