"""The cap on a process's RAM, each case in a process of its own, with real limits."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowmem import background
from lowmem.background import ThreadPool, in_background, stoppable
from lowmem.errors import OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.machine import cap, sampler
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.cap import READY_THREADS
from lowmem.machine.direct_io import Shard
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.monitor import PeakMeter, trim_heap
from lowmem.units import MB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a cap")

BUDGET = 400 * MB
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def peak(job: Callable[..., Any], **arguments: Any) -> int:
    """Run `job` under `BUDGET`; its peak."""
    *_, finished = run_isolated(f"{__name__}:{job.__name__}", arguments, budget=MemoryBudget(BUDGET))
    assert isinstance(finished, Finished)
    return finished.peak_bytes["ram"]


def held() -> int:
    return psutil.Process().memory_info().rss


def mapped(count: int) -> mmap.mmap:
    """Private memory without pages yet."""
    return mmap.mmap(-1, count, flags=PRIVATE)


def touch(memory: mmap.mmap) -> None:
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page] = 1


def touching_after_mapping(share: float, pause: float) -> Iterator[Step]:
    """Map blocks of `share` of the budget until one is refused, `pause` seconds apart; touch them only then."""
    yield Step(0, 0, "")
    blocks: list[mmap.mmap] = []
    with suppress(OSError):  # mmap's way to say MemoryError
        while len(blocks) < 100:
            blocks.append(mapped(int(share * BUDGET)))
            time.sleep(pause)
    for block in blocks:
        touch(block)


@pytest.mark.parametrize("pause", [0.0, 0.03])
@pytest.mark.parametrize("share", [0.3, 0.1, 0.02])
def test_blocks_that_are_mapped_first_and_touched_later_stay_below_the_budget(share, pause):
    assert (0.98 - share) * BUDGET < peak(touching_after_mapping, share=share, pause=pause) < 1.01 * BUDGET


def replacing() -> Iterator[Step]:
    """Buffers that replace each other, of which the budget allows one."""
    yield Step(0, 0, "")
    size = int(0.9 * (BUDGET - held()))
    for _ in range(5):
        block = mapped(size)
        touch(block)
        block.close()


def test_memory_that_was_unmapped_can_be_mapped_again_at_once():
    assert 0.85 * BUDGET < peak(replacing) < BUDGET


def giving_back() -> Iterator[Step]:
    """A heap that returns pages and keeps their addresses."""
    yield Step(0, 0, "")
    size = int(0.8 * (BUDGET - held()))
    block = mapped(size)
    touch(block)
    time.sleep(2.0)
    block.madvise(mmap.MADV_DONTNEED)
    time.sleep(0.1)
    touch(mapped(size))


def test_pages_that_a_heap_gave_back_do_not_count():
    assert 0.75 * BUDGET < peak(giving_back) < BUDGET


def starting_threads(count: int) -> Iterator[Step]:
    """Their stacks are mapped at once and hardly touched."""
    yield Step(0, 0, "")
    done = threading.Event()
    for _ in range(count):
        threading.Thread(target=done.wait, daemon=True).start()
    time.sleep(0.1)
    touch(mapped(int(0.9 * (BUDGET - held()))))


def test_stacks_of_threads_do_not_count():
    assert 0.85 * BUDGET < peak(starting_threads, count=20) < BUDGET


def mapping_weights(path: str) -> Iterator[Step]:
    yield Step(0, 0, "")
    shard = Shard(Path(path))
    with shard.map() as pages:
        assert len(pages) > BUDGET
        pages[0]


def test_a_file_of_weights_larger_than_the_budget_can_be_mapped(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(2 * BUDGET)
    assert peak(mapping_weights, path=str(path)) < BUDGET


def fill() -> list[mmap.mmap]:
    """Hold memory until less than 1 MB can be mapped."""
    blocks: list[mmap.mmap] = []
    for size in (16 * MB, MB, MB // 4):
        with suppress(OSError):
            while True:
                blocks.append(mapped(size))
                touch(blocks[-1])
    time.sleep(0.1)
    return blocks[:-2]


def metering() -> Iterator[Step]:
    yield Step(0, 0, "")
    filled = fill()
    for _ in range(50):
        with PeakMeter(MemoryBudget(2 * BUDGET)) as meter:
            meter.check()
    assert meter.peak["ram"] > 0.9 * BUDGET
    del filled


def working_in_the_background(count: int) -> Iterator[Step]:
    yield Step(0, 0, "")
    filled = fill()
    for _ in range(50):
        assert stoppable(lambda: 1, CancelToken()) == 1
    done = threading.Event()
    running = [in_background(done.wait) for _ in range(count)]
    done.set()
    assert all(one.result() for one in running)
    del filled


def mapping_in_a_pool() -> Iterator[Step]:
    yield Step(0, 0, "")
    filled = fill()
    for _ in range(50):
        with ThreadPool(READY_THREADS) as pool:
            assert list(pool.map(abs, range(-9, 0))) == list(range(9, 0, -1))
    del filled


@pytest.mark.parametrize(
    ("job", "arguments"), [(metering, {}), (working_in_the_background, {"count": 2}), (mapping_in_a_pool, {})]
)
def test_actions_within_a_megabyte_of_the_cap_start_no_threads(job, arguments):
    assert 0.95 * BUDGET < peak(job, **arguments) < 1.01 * BUDGET


def test_a_thread_too_many_near_the_cap_is_out_of_memory():
    started = time.monotonic()
    with pytest.raises(OutOfMemory):
        peak(working_in_the_background, count=READY_THREADS + 1)
    assert time.monotonic() - started < 20


def thread_without_memory() -> Iterator[Step]:
    """Its stack is there, but nothing else."""
    yield Step(0, 0, "")
    busy = [in_background(time.sleep, 60) for _ in range(READY_THREADS)]
    background._Helper._run = lambda self: None  # as one that died of MemoryError
    in_background(abs, 1)
    del busy


def test_a_thread_that_dies_before_it_runs_is_out_of_memory():
    with pytest.raises(OutOfMemory, match="another thread"):
        peak(thread_without_memory)


def mapping_while_the_heap_shrinks() -> Iterator[Step]:
    """What the heap gives back in the moment of a mapping does not count as mapped and still to be filled."""
    yield Step(0, 0, "")
    sampler.unwatch(cap._cap.look)  # as on a busy machine, where ticks come late
    small = [bytearray(b"x") * 100_000 for _ in range(600)]
    last = bytearray(b"x") * 100_000
    cap.update_cap()
    del small
    block = mapped(60 * MB)
    touch(block)
    trim_heap()
    touch(mapped(int(0.95 * (BUDGET - held()))))
    del last


def test_a_heap_that_shrinks_beside_a_new_mapping_leaves_the_budget_whole():
    assert 0.9 * BUDGET < peak(mapping_while_the_heap_shrinks) < 1.01 * BUDGET


def ending_threads() -> Iterator[Step]:
    """Their stacks stay mapped for the next ones."""
    yield Step(0, 0, "")
    done = threading.Event()
    running = [threading.Thread(target=done.wait) for _ in range(4)]
    for thread in running:
        thread.start()
    time.sleep(0.1)
    done.set()
    for thread in running:
        thread.join()
    time.sleep(0.1)
    touch(mapped(int(0.95 * (BUDGET - held()))))


def test_stacks_of_ended_threads_do_not_count():
    assert 0.9 * BUDGET < peak(ending_threads) < 1.01 * BUDGET


def padding() -> Iterator[Step]:
    """Mapped for good, and never filled: as packed weights are padded."""
    yield Step(0, 0, "")
    padded = mapped(100 * MB)
    cap.settle()
    touch(mapped(int(0.95 * (BUDGET - held()))))
    del padded


def test_what_was_never_filled_does_not_count_in_the_next_action():
    assert 0.9 * BUDGET < peak(padding) < 1.01 * BUDGET
