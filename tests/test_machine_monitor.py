"""Snapshots, the peak meter's promise (exact, nestable, enforcing) and memory given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from lowmem.errors import OutOfMemory
from lowmem.machine import gpu, monitor, sampler
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.memory_limits import process_bytes
from lowmem.machine.monitor import PeakMeter, release_memory, snapshot
from lowmem.units import MB


def hold(count: int) -> mmap.mmap:
    """Memory that is really there, every page written, and new: not what the heap has kept of earlier tests."""
    held = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, count, mmap.PAGESIZE):
        held[page] = 1
    return held


@pytest.fixture(params=["kernel", "sampled"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to know the peak: the kernel's mark, and samples where there is no mark to reset."""
    if request.param == "sampled":
        monkeypatch.setattr(monitor, "_reset_peaks", lambda: False)
    elif not Path("/proc/self/clear_refs").exists():
        pytest.skip("this kernel keeps no high-water mark")
    return request.param


def spike(count: int, source: str) -> None:
    """Hold memory briefly: for an instant, or as long as a sampler needs."""
    held = hold(count)
    if source == "sampled":
        time.sleep(0.1)
    del held


def test_the_peak_outlives_the_spike(source: str) -> None:
    with PeakMeter() as meter:
        before = process_bytes()
        spike(120 * MB, source)
        assert meter.peak["ram"] - before == pytest.approx(120 * MB, rel=0.05)
    after = meter.peak
    spike(200 * MB, source)
    assert meter.peak == after


def test_a_meter_forgets_what_was_before_it(source: str) -> None:
    spike(150 * MB, source)
    release_memory()
    with PeakMeter() as meter:
        before = process_bytes()
    assert meter.peak["ram"] - before < 50 * MB


def test_meters_nest(source: str) -> None:
    before = process_bytes()
    with PeakMeter() as outer:
        spike(160 * MB, source)
        with PeakMeter() as inner:
            spike(80 * MB, source)
        with PeakMeter() as innermost:
            pass
    assert outer.peak["ram"] - before == pytest.approx(160 * MB, rel=0.1)
    assert inner.peak["ram"] - before == pytest.approx(80 * MB, rel=0.1)
    assert innermost.peak["ram"] - before < 40 * MB


def test_an_outer_meter_sees_what_an_inner_one_measured(source: str) -> None:
    before = process_bytes()
    with PeakMeter() as outer:
        with PeakMeter():
            spike(160 * MB, source)
        assert outer.peak["ram"] - before == pytest.approx(160 * MB, rel=0.1)


def test_meters_of_two_threads_may_overlap(source: str) -> None:
    first, second = PeakMeter(), PeakMeter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    before = process_bytes()
    spike(100 * MB, source)
    second.__exit__(None, None, None)
    assert second.peak["ram"] - before == pytest.approx(100 * MB, rel=0.1)
    assert first.peak["ram"] - before < 40 * MB


def fill(held: list[mmap.mmap], meter: PeakMeter) -> None:
    """A long loop as the engine has them."""
    for _ in range(20):
        held.append(hold(10 * MB))
        meter.check()


@pytest.mark.usefixtures("source")
def test_a_limit_stops_the_loop_that_checks() -> None:
    held: list[mmap.mmap] = []
    with PeakMeter(MemoryBudget(ram=process_bytes() + 40 * MB)) as meter:
        meter.check()
        with pytest.raises(OutOfMemory, match="more than the budget of") as caught:
            fill(held, meter)
    assert 3 <= len(held) <= 6
    assert caught.value.hint
    assert meter.exceeded == caught.value.message


def test_the_sampler_remembers_a_limit_passed_between_two_checks() -> None:
    with PeakMeter(MemoryBudget(ram=process_bytes() + 40 * MB)) as meter:
        spike(100 * MB, "sampled")
        with pytest.raises(OutOfMemory, match="RAM"):
            meter.check()


def test_nothing_is_sampled_without_need(source: str) -> None:
    if source == "sampled":
        pytest.skip("without a mark every meter samples")
    before = list(sampler._looks)
    with PeakMeter():
        assert sampler._looks == before
    with PeakMeter(MemoryBudget(ram=10**15)):
        assert len(sampler._looks) == len(before) + 1
    assert sampler._looks == before


@pytest.mark.usefixtures("source")
def test_meters_share_one_thread() -> None:
    with PeakMeter(MemoryBudget(ram=10**15)):
        before = threading.active_count()
        for _ in range(20):
            with PeakMeter(MemoryBudget(ram=10**15)), PeakMeter(MemoryBudget(ram=10**15)):
                assert threading.active_count() == before


def test_sampling_goes_on_after_an_error() -> None:
    ticks: list[int] = []

    def failing(tick: int) -> None:
        ticks.append(tick)
        raise MemoryError

    sampler.watch(failing)
    with PeakMeter(MemoryBudget(ram=process_bytes() + 40 * MB)) as meter:
        spike(100 * MB, "sampled")
        assert meter.exceeded
    sampler.unwatch(failing)
    assert len(ticks) > 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only Unix forks")
def test_a_fork_samples_with_a_thread_of_its_own() -> None:
    code = """
import os, time
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.monitor import PeakMeter
with PeakMeter(MemoryBudget(ram=10**15)):
    time.sleep(0.05)
    child = os.fork()
    if not child:
        with PeakMeter(MemoryBudget(ram=1)) as meter:
            time.sleep(0.2)
            os._exit(7 if meter.exceeded else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "7"


def test_an_error_closes_the_meter() -> None:
    with pytest.raises(ValueError, match="inside"), PeakMeter(MemoryBudget(ram=10**15)):
        raise ValueError("inside")
    assert monitor._open == []


class FakeCuda:
    """One GPU's counters as torch keeps them."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def allocate(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def memory_allocated(self, _index: int) -> int:
        return self.now

    def max_memory_allocated(self, _index: int) -> int:
        return self.most

    def reset_peak_memory_stats(self, _index: int) -> None:
        self.most = self.now


def test_vram_peaks_nest_and_are_enforced(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(gpu, "loaded_torch", lambda: types.SimpleNamespace(cuda=cuda))
    cuda.allocate(900 * MB)
    cuda.allocate(-800 * MB)
    with PeakMeter() as outer:
        cuda.allocate(400 * MB)
        cuda.allocate(-300 * MB)
        with PeakMeter(MemoryBudget(vram=600 * MB)) as inner:
            cuda.allocate(100 * MB)
            inner.check()
            assert inner.peak["vram"] == 300 * MB
            cuda.allocate(400 * MB)
            with pytest.raises(OutOfMemory, match="700 MB of GPU memory in use, 100 MB more than the budget of 600 MB"):
                inner.check()
            cuda.allocate(-600 * MB)
    assert inner.peak["vram"] == 700 * MB
    assert outer.peak["vram"] == 700 * MB


def test_snapshot_adds_up_and_takes_under_5_ms() -> None:
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        found = snapshot()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.005
    assert found.ram_used + found.ram_free == found.ram_total
    assert 0 < found.process_bytes < found.ram_total
    assert found.disk_free > 0


def test_snapshot_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu.Device("cuda:0", "NVIDIA T4", 15 * MB, 5 * MB, ("fp16",))
    monkeypatch.setattr(gpu, "gpus", lambda: ((device,), ""))
    assert snapshot().vram == (("NVIDIA T4", 10 * MB, 15 * MB),)
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    assert snapshot().vram == ()


def test_released_memory_leaves_the_process() -> None:
    # Blocks below glibc's mmap threshold, with one kept at the top of the heap: freed, they stay without a trim.
    code = """
from lowmem.machine.memory_limits import process_bytes
from lowmem.machine.monitor import release_memory
before = process_bytes()
blocks = [bytearray(b"x") * 100_000 for _ in range(2000)]
keep = bytearray(b"x") * 100_000
held = process_bytes() - before
del blocks
release_memory()
print(held, process_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 190 * MB
    assert left < 0.05 * held


_HEAP_CHILD = """
import ctypes
import mmap
import torch
from lowmem.generate.cache.full import FullLayer
from lowmem.machine.monitor import outside_heap

class Statistics(ctypes.Structure):  # of mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "blocks", "mapped", "usmblks", "fsmblks", "used", "free", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Statistics

def writable():
    return int(open("/proc/self/statm").read().split()[5]) * mmap.PAGESIZE

with outside_heap():
    pass
states = torch.zeros(1, 2, 8, 64)
FullLayer(1, 8).update(states, states)  # what the first call imports
layer = FullLayer(1, 8192)
heap, before = mallinfo(), writable()
layer.update(states, states)
print(mallinfo().arena - heap.arena, writable() - before)
cached = mallinfo()
for _ in range(8):
    large = [torch.ones(8, 256, 1024) for _ in range(4)]
    small = large[0][:3].clone()
    del large
print(mallinfo().arena - cached.arena)
before = writable()
del layer
print(before - writable())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
def test_the_cache_and_large_activations_are_mapped_outside_the_heap() -> None:
    done = subprocess.run([sys.executable, "-c", _HEAP_CHILD], capture_output=True, text=True, check=True)
    by_cache, mapped, by_activations, returned = map(int, done.stdout.split())
    cache = 2 * 2 * 8192 * 64 * 4
    assert by_cache < 0.1 * cache
    assert mapped == pytest.approx(cache, rel=0.05)
    assert by_activations < 32 * MB  # eight rounds of three small blocks
    assert returned == pytest.approx(cache, rel=0.05)
