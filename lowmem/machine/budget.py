"""The memory budget: the most bytes a run may use, by device. One type from slider, flag and API down to the kernels."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from lowmem.errors import BadInput
from lowmem.machine import memory_limits
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.units import MB, format_bytes, parse_bytes

SMALLEST_BYTES = 100 * MB
"""Below this not even Python with numpy runs; a smaller number is a typo."""

RESERVE_SHARE, RESERVE_BYTES = 0.05, 256 * MB
"""Left free for the desktop, the driver and other programs: this share, and at least this many bytes."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes by device; None sets no limit.

    Args:
        ram: RAM of the whole process, with what it held before (resident set size).
        vram: memory of the GPU.
    """

    ram: int | None = None
    vram: int | None = None

    @classmethod
    def parse(cls, ram: str | float | None = None, vram: str | float | None = None) -> MemoryBudget:
        """From sizes as people write them: "4G", "512M", 4_000_000_000; "" and None set no limit.

        Raises:
            BadInput: not a size, or below 100 MB.
        """
        return cls(_size("RAM", ram), _size("VRAM", vram))

    @classmethod
    def detect(cls, hardware: Hardware) -> MemoryBudget:
        """What is free now and what this process holds already, less a reserve. No `vram` without a GPU."""
        vram = hardware.gpus[0].free_bytes if hardware.gpus else None
        ram = hardware.cpu.free_bytes + hardware.process_bytes
        return cls(_less_reserve(ram), None if vram is None else _less_reserve(vram))

    def bounded(self, hardware: Hardware) -> MemoryBudget:
        """This budget, lowered to what `detect` finds where it is above that or sets no limit.

        Raises:
            BadInput: a limit for GPU memory on a machine without a GPU.
        """
        found = self.detect(hardware)
        if self.vram is not None and found.vram is None:
            raise BadInput(
                msg("This machine has no GPU, so {vram} of GPU memory cannot be used.", vram=format_bytes(self.vram)),
                msg("Leave it out to run on the CPU, or plan for another machine: lowmem plan --vram SIZE."),
            )
        vram = None if found.vram is None else min(self.limit("vram"), found.vram)
        return MemoryBudget(min(self.limit("ram"), found.limit("ram")), vram)

    def within(self, ceiling: MemoryBudget) -> MemoryBudget:
        """This budget, lowered to `ceiling` where it is above that or sets no limit."""
        return MemoryBudget(**{m: min(self.limit(m), ceiling.limit(m)) for m in {*self.as_dict(), *ceiling.as_dict()}})

    def for_child_process(self) -> MemoryBudget:
        """What a child process may use while this process keeps the RAM it holds."""
        if self.ram is None:
            return self
        return MemoryBudget(max(0, self.ram - memory_limits.process_bytes()), self.vram)

    def limit(self, memory: str) -> int:
        """Bytes of "ram" or "vram"; `sys.maxsize` where no limit is set."""
        return self.as_dict().get(memory, sys.maxsize)

    def as_dict(self) -> dict[str, int]:
        """The limits that are set, for JSON: `MemoryBudget(**budget.as_dict()) == budget`."""
        return {memory: count for memory, count in asdict(self).items() if count is not None}


UNLIMITED = MemoryBudget()


def _less_reserve(count: int) -> int:
    return max(0, count - max(RESERVE_BYTES, int(RESERVE_SHARE * count)))


def _size(name: str, value: str | float | None) -> int | None:
    if value is None or value == "":
        return None
    count = parse_bytes(value)
    if count < SMALLEST_BYTES:
        raise BadInput(
            msg("A {name} budget of {count} is below the smallest, 100 MB.", name=name, count=format_bytes(count)),
            msg("Write it like 4G or 512M."),
        )
    return count
