"""A cap on this process's own RAM: an allocation beyond the budget fails, and becomes `OutOfMemory`.

Without one, a process notices an exceeded budget only when it looks, and a machine without spare RAM swaps or has the
kernel kill something first. Linux enforces RLIMIT_DATA, which counts private writable memory when it is mapped and
not when it is touched, see setrlimit(2). The limit is set 100 times a second, so that what may be mapped next is

    room = budget - resident - untouched beyond an allowance

where untouched memory is what was mapped within the last second and has no pages yet. Older untouched memory (stacks of
threads, an allocator's reserve) is not counted. The allowance is for buffers that exist before their pages do: a tensor
that is about to be filled while the one that it replaces is still there.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from lowmem.machine import gpu
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.memory_limits import relatives_bytes
from lowmem.messages import msg
from lowmem.units import MB

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

INTERVAL_SECONDS = 0.01
SETTLED_SECONDS = 1.0
"""Memory that stays untouched for this long is a reserve."""

ALLOWANCE_BYTES = 192 * MB
"""Untouched memory that does not count against the budget; less where less of the budget is left."""

SLACK_BYTES = 4 * MB
"""Beyond the budget, so that an error can be raised, caught and written down."""


def can_cap() -> bool:
    """Whether this system enforces a cap: Linux does, macOS and Windows do not."""
    return resource is not None and sys.platform == "linux" and Path("/proc/self/statm").exists()


def cap_note() -> str:
    """How the RAM budget of this process is kept where it is not capped; "" where it is."""
    if not can_cap():
        return msg("This system offers no cap on memory: the budget is watched, and work that exceeds it is stopped.")
    if gpu.torch_with_cuda():
        return msg("Beside CUDA the RAM budget is watched, not capped; GPU memory is capped.")
    return ""


class MemoryCap:
    """Keeps this process's memory below a budget, from a thread of its own.

    Not beside CUDA, whose driver maps host memory by the gigabyte: there only the GPU's own share is capped.

    Args:
        limit: RAM in bytes, counted like `process_bytes`; None for no cap.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._gaps: deque[tuple[float, int]] = deque()
        self._set = -1
        threading.Thread(target=self._watch, daemon=True, name="lowmem-cap").start()

    def _watch(self) -> None:
        while True:
            with suppress(MemoryError, OSError):  # at the cap even a file cannot be read; the next turn may
                self.update()
            time.sleep(INTERVAL_SECONDS)

    def update(self) -> None:
        """Set the limit for what is in use now."""
        if self.limit is None or gpu.torch_with_cuda():
            self._apply(resource.RLIM_INFINITY)
            return
        now, (mapped, resident) = time.monotonic(), _private_and_resident_bytes()
        gap = mapped - resident
        # Of the last second, the least, kept as a rising sequence.
        while self._gaps and self._gaps[-1][1] >= gap:
            self._gaps.pop()
        self._gaps.append((now, gap))
        while self._gaps[0][0] < now - SETTLED_SECONDS:
            self._gaps.popleft()
        settled, limit = self._gaps[0][1], self.limit - relatives_bytes()
        allowance = min(ALLOWANCE_BYTES, max(0, limit - resident))
        self._apply(max(0, limit + settled + min(gap - settled, allowance) + SLACK_BYTES))

    def _apply(self, limit: int) -> None:
        if limit != self._set:
            most = resource.getrlimit(resource.RLIMIT_DATA)[1]
            resource.setrlimit(resource.RLIMIT_DATA, (limit if most < 0 else min(limit, most), most))
            self._set = limit


_cap: MemoryCap | None = None


def cap_memory(budget: MemoryBudget) -> None:
    """Cap this process's RAM, or move or lift the cap."""
    global _cap
    if can_cap() and (_cap is not None or budget.ram is not None):
        _cap = _cap or MemoryCap()
        _cap.limit = budget.ram
        _cap.update()


def cap_gpu_memory(budget: MemoryBudget) -> None:
    """Limit what torch may allocate on the first GPU, as on a GPU of that size. Torch must be loaded; starts CUDA."""
    torch = gpu.loaded_torch()
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget.limit("vram") / total))


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def _private_and_resident_bytes() -> tuple[int, int]:
    """Private writable memory, touched or not, and the resident set, which programs and mapped files belong to, too."""
    pages = Path("/proc/self/statm").read_text().split()
    return _PAGE * int(pages[5]), _PAGE * int(pages[1])
