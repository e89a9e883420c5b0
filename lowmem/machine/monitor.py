"""What is in use now, what the peak of a piece of work was, and how to give memory back.

Works in this process only: a child's memory is not counted. Imports torch only when
somebody else already has.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from lowmem.errors import OutOfMemory
from lowmem.machine import gpu, memory_limits
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import disk_free_bytes
from lowmem.machine.memory_limits import process_bytes
from lowmem.settings import settings
from lowmem.units import format_bytes


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
    """Look at the meters; takes a few milliseconds at most."""
    ram = memory_limits.ram()
    # A ZeroGPU is not there between two actions, so nothing of it can be in use.
    found = () if settings().host == "zerogpu" else gpu.gpus()[0]
    return Snapshot(
        ram_used=ram.total_bytes - ram.free_bytes,
        ram_total=ram.total_bytes,
        ram_free=ram.free_bytes,
        process_bytes=process_bytes(),
        vram=tuple((device.name, device.total_bytes - device.free_bytes, device.total_bytes) for device in found),
        disk_free=disk_free_bytes(settings().home),
    )


_MEMORY_NAMES = {"ram": "RAM", "vram": "GPU memory"}
_SAMPLE_SECONDS = 0.01
_lock = threading.RLock()
_open: list[PeakMeter] = []  # meters that run now; all of them share the kernel's one high-water mark


class PeakMeter:
    """Peak memory of the block it surrounds, and the end of it when a limit is passed.

    RAM is this process's resident set: on Linux the kernel's high-water mark, elsewhere
    sampled every 10 ms. VRAM is what torch's tensors held. Meters nest.

    Args:
        budget: the limits, counted like `peak`: RAM of the whole process, with what it held before.
    """

    def __init__(self, budget: MemoryBudget = UNLIMITED) -> None:
        self._limits = budget.as_dict()
        self._peak: dict[str, int] = {}
        self._exact = False
        self._done = threading.Event()
        self._sampler: threading.Thread | None = None
        self.exceeded = ""
        """Which limit was passed, in a sentence with its numbers; "" while none was."""

    @property
    def peak(self) -> dict[str, int]:
        """Peak bytes so far by memory: "ram", and "vram" once CUDA is in use."""
        with _lock:
            if self in _open:
                _share_peaks()
            return dict(self._peak)

    def check(self) -> None:
        """Long loops call this at least once a second.

        Raises:
            OutOfMemory: a limit was passed, now or at any moment before.
        """
        if self._limits and not self.exceeded:
            self._sample()
        if self.exceeded:
            raise OutOfMemory(self.exceeded, "Use a shorter context, fewer bits, a smaller batch or a larger budget.")

    def __enter__(self) -> PeakMeter:
        with _lock:
            _share_peaks()  # the reset would lose what the outer meters have seen
            self._exact = _reset_peaks()
            _open.append(self)
        self._note(_in_use())
        if self._limits or not self._exact:
            self._sampler = threading.Thread(target=self._watch, name="lowmem-peak-meter", daemon=True)
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._sampler is not None:
            self._sampler.join()
        self._note(_in_use())
        with _lock:
            _share_peaks()
            _open.remove(self)

    def _watch(self) -> None:
        for tick in itertools.count(1):
            if self._done.wait(_SAMPLE_SECONDS):
                return
            # torch takes a tenth of a millisecond to sum up a GPU, and Python's lock with it.
            self._sample(vram=tick % 10 == 0)

    def _sample(self, *, vram: bool = True) -> None:
        used = _in_use(vram=vram and "vram" in self._limits)
        self._note(used)
        for memory, limit in self._limits.items():
            over = used.get(memory, 0) - limit
            if over > 0 and not self.exceeded:
                self.exceeded = (
                    f"{format_bytes(used[memory])} of {_MEMORY_NAMES[memory]} in use, "
                    f"{format_bytes(over)} more than the budget of {format_bytes(limit)}."
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
    """Tell every open meter the high-water marks since the last reset, which all of them have lived through."""
    marks: dict[str, int] = {}
    if _open and _open[-1]._exact:
        marks["ram"] = _high_water_bytes()
    if torch := gpu.torch_with_cuda():
        marks["vram"] = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    for meter in _open:
        meter._note(marks)


def _reset_peaks() -> bool:
    """Start the high-water marks afresh; False where RAM has none that can be reset."""
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
    """Give freed memory back to the machine: Python's, torch's cache on the GPU, the allocator's."""
    gc.collect()
    if torch := gpu.torch_with_cuda():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return the allocator's free pages to the system; takes about a millisecond.

    glibc keeps freed blocks below its mmap threshold (up to 32 MB, so most weights) in its heap:
    without this call they stay with the process.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
