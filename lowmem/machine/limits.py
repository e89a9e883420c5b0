"""How much memory may be used: what is free, less a reserve, lowered to what the person allows."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import BadInput
from lowmem.machine.hardware import Hardware
from lowmem.units import MB, format_bytes

RESERVE_SHARE = 0.05  # left to the desktop, the driver and other programs


RESERVE_MINIMUM = 256 * MB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that may be used: RAM of the whole process, and memory of the GPU (None without one)."""

    ram: int
    vram: int | None = None


def detected_limits(hardware: Hardware) -> Limits:
    """All that is free now and what this process holds already, less a reserve for everybody else."""
    ram = hardware.cpu.free_bytes + hardware.process_bytes
    vram = hardware.gpus[0].free_bytes if hardware.gpus else None
    return Limits(_less_reserve(ram), None if vram is None else _less_reserve(vram))


def _less_reserve(count: int) -> int:
    return max(0, count - max(RESERVE_MINIMUM, int(RESERVE_SHARE * count)))


def limits_from(hardware: Hardware, ram: int | None = None, vram: int | None = None) -> Limits:
    """The detected limits, lowered (never raised) to what the person allows.

    Raises:
        BadInput: a limit below 100 MB.
    """
    detected = detected_limits(hardware)
    for name, value in (("RAM", ram), ("VRAM", vram)):
        if value is not None and value < 100 * MB:
            raise BadInput(
                f"A {name} budget of {format_bytes(value)} is below the smallest, 100 MB.", "Write it like 4G or 512M."
            )
    lowered = detected.ram if ram is None else min(ram, detected.ram)
    if detected.vram is None:
        return Limits(lowered)
    return Limits(lowered, detected.vram if vram is None else min(vram, detected.vram))
