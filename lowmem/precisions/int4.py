"""4-bit weights in a graph for ONNX Runtime, which torch does not run."""

from __future__ import annotations

from lowmem.machine.device import Device
from lowmem.messages import msg
from lowmem.precisions.base import Precision


class Int4(Precision):
    def refusal(self, device: Device) -> str | None:
        return None if device.kind == "cpu" else msg("int4 graphs run on CPUs; on a GPU use NF4.")


PRECISION = Int4("int4", msg("int4 (ONNX Runtime, for CPU)"), backends=("onnx",))
