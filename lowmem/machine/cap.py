"""A cap on this process's own RAM: an allocation beyond the budget fails, and becomes `OutOfMemory`.

Without one, a process notices an exceeded budget only when it looks, and a machine without spare RAM swaps or has the
kernel kill something first. Linux enforces RLIMIT_DATA on private writable memory when it is mapped, not when it is
touched, see setrlimit(2). The sampler's thread sets the limit 50 times a second to

    budget - pages of mapped files - RSS of the processes that share the budget + reserve

where the reserve has no pages and hardly ever will: stacks of threads, what was untouched before the cap, holes of the
heap. Any other memory counts from when it is mapped, so buffers that are mapped first and filled later stay within the
budget, however fast.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lowmem.background import keep_idle
from lowmem.machine import gpu, sampler
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.memory_limits import other_processes_bytes
from lowmem.messages import msg

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

READY_THREADS = 2
"""Background threads that start before the cap tightens: what an action uses at once."""


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
    """Keeps this process's memory below a budget; the sampler calls `update`.

    Not beside CUDA, whose driver maps host memory by the gigabyte: there only the GPU's own share is capped.

    Args:
        limit: RAM in bytes, counted like `process_bytes`; None for no cap.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._before: _Memory | None = None
        self._fresh = 0  # bytes mapped under the cap that have no pages yet
        self._set = -1
        self._lock = threading.Lock()

    def look(self, tick: int) -> None:
        if tick % 2:
            self.update()

    def update(self) -> None:
        """Set the limit for what is in use now."""
        with self._lock:
            if self.limit is None or gpu.torch_with_cuda():
                self._before, self._fresh = None, 0
                self._apply(resource.RLIM_INFINITY)
                return
            memory = _memory()
            before = self._before or memory
            # The stack of a thread that ended stays mapped, for the next one.
            self._before = memory = memory._replace(threads=max(memory.threads, before.threads))
            stacks = _stack_bytes() * (memory.threads - before.threads)
            mapped, untouched = memory.mapped - before.mapped - stacks, memory.untouched - before.untouched - stacks
            # What the heap gave back is untouched, too, but it was not mapped just now.
            self._fresh = max(0, self._fresh + min(untouched, max(0, mapped)))
            reserve = memory.untouched - self._fresh
            self._apply(max(0, self.limit - other_processes_bytes() - memory.files + reserve))

    def settle(self) -> None:
        self._before, self._fresh = None, 0
        self.update()

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
        if _cap is None:
            keep_idle(READY_THREADS)
            _cap = MemoryCap()
            sampler.watch(_cap.look)
        _cap.limit = budget.ram
        _cap.update()


def settle() -> None:
    """Call between actions: what has no pages now, like the padding of packed weights, will have none."""
    if _cap is not None:
        _cap.settle()


def update_cap() -> None:
    """Look at the memory in use now, if there is a cap."""
    if _cap is not None:
        with suppress(MemoryError, OSError):
            _cap.update()


def cap_gpu_memory(budget: MemoryBudget) -> None:
    """Limit what torch may allocate on the first GPU, as on a GPU of that size. Torch must be loaded; starts CUDA."""
    torch = gpu.loaded_torch()
    if torch is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget.limit("vram") / total))


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class _Memory(NamedTuple):
    """Bytes of this process: private writable ones, those of them without pages, and pages of mapped files; its threads."""

    mapped: int
    untouched: int
    files: int
    threads: int


def _memory() -> _Memory:
    """See proc_pid_statm(5)."""
    _, resident, files, _, _, mapped, _ = (_PAGE * int(pages) for pages in Path("/proc/self/statm").read_text().split())
    return _Memory(mapped, mapped - (resident - files), files, Path("/proc/self/task").stat().st_nlink - 2)


@functools.cache
def _stack_bytes() -> int:
    """Of a new thread, see pthread_attr_setstacksize(3)."""
    limit = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return 2**21 if limit < 0 else limit
