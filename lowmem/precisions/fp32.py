"""Full precision: exact, and what every CPU computes in."""

from __future__ import annotations

from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision


class Fp32(Precision):
    def rank(self, device: Device) -> int | None:
        return 2 if device.kind == "cpu" else super().rank(device)


PRECISION = Fp32("fp32", msg("fp32 (full precision)"), dtype="fp32", backends=("torch", "onnx"))
