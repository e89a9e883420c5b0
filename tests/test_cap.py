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

from lowmem.events import Step
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.direct_io import Shard
from lowmem.machine.isolated import Finished, run_isolated
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
