"""Memory in use, the peak of a piece of work, and freeing memory.

Counts this process and those that share its budget, see `memory_limits.share_budget_with`; no other children. Never imports torch itself.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lowmem.errors import OutOfMemory
from lowmem.machine import gpu, memory_limits, sampler
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.cap import update_cap
from lowmem.machine.hardware import disk_free_bytes
from lowmem.machine.memory_limits import process_bytes
from lowmem.messages import msg
from lowmem.settings import settings
from lowmem.units import MB, format_bytes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Memory at one moment, in bytes. `vram` has (name, used, total) per GPU."""

    ram_used: int
    ram_total: int
    ram_free: int
    process_bytes: int
    vram: tuple[tuple[str, int, int], ...]
    disk_free: int


def snapshot() -> Snapshot:
    """The current figures; takes a few milliseconds at most."""
    ram = memory_limits.ram()
    # A ZeroGPU is detached between actions, so none of its memory is in use.
    found = () if settings().host == "zerogpu" else gpu.gpus()[0]
    return Snapshot(
        ram_used=ram.total_bytes - ram.free_bytes,
        ram_total=ram.total_bytes,
        ram_free=ram.free_bytes,
        process_bytes=process_bytes(),
        vram=tuple((device.name, device.total_bytes - device.free_bytes, device.total_bytes) for device in found),
        disk_free=disk_free_bytes(settings().home),
    )


_MEMORY_NAMES = {"ram": "RAM", "vram": msg("GPU memory")}
_lock = threading.RLock()
_open: list[PeakMeter] = []  # running meters, innermost last; they share the kernel's single high-water mark


class PeakMeter:
    """A context manager that measures the peak memory of its block and enforces a budget.

    RAM is the resident set of `process_bytes`: on Linux the kernel's high-water mark, elsewhere
    sampled every 10 ms. VRAM is what torch's tensors held. Meters nest.

    Args:
        budget: the limits, counted like `peak`: RAM of the whole process, with what it held before.
    """

    def __init__(self, budget: MemoryBudget = UNLIMITED) -> None:
        self._limits = budget.as_dict()
        self._peak: dict[str, int] = {}
        self._exact = False
        self._sampled = False
        self.exceeded = ""
        """The limit that was exceeded, as a sentence with its numbers; "" if none was."""

    @property
    def peak(self) -> dict[str, int]:
        """Peak bytes so far by memory: "ram", and "vram" once CUDA is in use."""
        with _lock:
            if self in _open:
                _share_peaks()
            return dict(self._peak)

    def check(self) -> None:
        """Enforce the budget; call this at least once a second in long loops.

        Raises:
            OutOfMemory: a limit is or was exceeded.
        """
        if self._limits and not self.exceeded:
            self._sample()
        if self.exceeded:
            raise OutOfMemory(
                self.exceeded, msg("Use a shorter context, fewer bits, a smaller batch or a larger budget.")
            )

    def __enter__(self) -> PeakMeter:
        if self._limits:
            sampler.start()  # which may fail
        with _lock:
            _share_peaks()  # before the reset, or the outer meters lose their peaks
            self._exact = _reset_peaks()
            _open.append(self)
        self._note(_in_use())
        self._sampled = bool(self._limits) or not self._exact
        if self._sampled:
            sampler.watch(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampled:
            sampler.unwatch(self._look)
        self._note(_in_use())
        with _lock:
            _share_peaks()
            _open.remove(self)

    def _look(self, tick: int) -> None:
        # Asking torch for GPU memory takes 0.1 ms and holds the GIL.
        self._sample(vram=tick % 10 == 0)

    def _sample(self, *, vram: bool = True) -> None:
        used = _in_use(vram=vram and "vram" in self._limits)
        self._note(used)
        for memory, limit in self._limits.items():
            over = used.get(memory, 0) - limit
            if over > 0 and not self.exceeded:
                self.exceeded = msg(
                    "{used} of {memory_names} in use, {over} more than the budget of {limit}.",
                    used=format_bytes(used[memory]),
                    memory_names=_MEMORY_NAMES[memory],
                    over=format_bytes(over),
                    limit=format_bytes(limit),
                )

    def _note(self, used: Mapping[str, int]) -> None:
        with _lock:
            for memory, count in used.items():
                self._peak[memory] = max(count, self._peak.get(memory, 0))


def _in_use(*, vram: bool = True) -> dict[str, int]:
    used = {"ram": process_bytes()}
    if vram and (torch := gpu.torch_with_cuda()):
        used["vram"] = sum(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))
    return used


def _share_peaks() -> None:
    """Report the high-water marks since the last reset to all open meters."""
    marks: dict[str, int] = {}
    if _open and _open[-1]._exact:
        marks["ram"] = _high_water_bytes() + memory_limits.other_processes_bytes()
    if torch := gpu.torch_with_cuda():
        marks["vram"] = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    for meter in _open:
        meter._note(marks)


def _reset_peaks() -> bool:
    """Reset the high-water marks; False if the system cannot reset that of RAM."""
    if torch := gpu.torch_with_cuda():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    try:
        # "5" resets VmHWM and nothing else, see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _high_water_bytes() -> int:
    """Linux's peak of the resident set since the last reset."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status[status.index("VmHWM:") :].split()[1])


def release_memory() -> None:
    """Return freed memory to the system: Python's, torch's GPU cache, and the allocator's."""
    gc.collect()
    if torch := gpu.torch_with_cuda():
        torch.cuda.empty_cache()
    trim_heap()


@contextmanager
def quick_collections() -> Iterator[None]:
    """Within the context, Python's garbage collector leaves out what exists now.

    Looking through the objects of torch and transformers takes 0.1 s, as long as rounding a small block to nearest.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_heap() -> None:
    """Return the allocator's free pages to the system; takes about a millisecond.

    glibc keeps freed blocks below its mmap threshold (up to 32 MB, so most weights) in its heap:
    without this call they stay with the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            # A cap that looks before and after does not take the pages that are given back for a new mapping.
            update_cap()
            trim(0)
            update_cap()


class HeapTrimmer:
    """Returns the heap's holes to the system while a model computes.

    Up to glibc 2.37 an aligned block rarely fits where one of the same size was freed, since small blocks fill the gaps that
    aligning leaves: activations of 20 MB made the heap of a prefill grow by 30 to 100 MB, all of it resident. Mapped
    activations leave no holes, but their page faults take as long as the computation of a small model.

    What one block touches is reused by the next. Once the process has grown by `GROWTH` beyond that, the heap is trimmed.
    """

    GROWTH = 8 * MB

    def __init__(self) -> None:
        self._limit = 0  # none yet

    def before_block(self) -> None:
        """Call this before each block: the limit is what one block leaves resident after a trim, and `GROWTH`."""
        if sys.platform == "linux" and not self._limit:
            self._limit = _resident_bytes() + self.GROWTH
        self.check()

    def check(self) -> None:
        """Trim the heap if it is beyond the limit."""
        if self._limit and _resident_bytes() > self._limit:
            trim_heap()
            self._limit = 0


def _resident_bytes() -> int:
    """Resident set size of this process, on Linux: ten times as fast as psutil's."""
    return mmap.PAGESIZE * int(Path("/proc/self/statm").read_bytes().split()[1])


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MAPPED_BLOCK = 64 * 1024
"""Bytes above which weights and caches are mapped, each on its own."""
_PASSING_BLOCK = 4 * MB
_KEPT_TOP = 64 * MB


@contextmanager
def outside_heap() -> Iterator[None]:
    """Let glibc map every block above 64 KB on its own during this block, which allocates weights or caches.

    Otherwise those of less than 32 MB come to lie in the heap between buffers that are freed soon, and the holes stay
    with the process: 55 MB beside 135 million fp32 weights, more in one run than in the next.

    Afterwards blocks above 4 MB stay mapped. Smaller activations come from the heap, which is reused without new page
    faults: a prefill of a small model is 1.4 times as fast as with mapped ones. A heap does not suit larger ones: up to
    glibc 2.37, aligned blocks rarely fit where one of the same size was freed, and a heap for activations of 40 MB grew
    to 270 MB.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED_BLOCK)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _PASSING_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_TOP)  # glibc's own choice, until it is given a number
