"""Where the tensors of a KV cache lie: outside the heap, and zero until they are written."""

import sys
from pathlib import Path

import pytest
import torch

from lowmem.generate.cache.full import FullLayer
from lowmem.generate.cache.storage import MAPPED_BYTES, new_store
from lowmem.machine.monitor import HeapTrimmer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_store_is_zero_and_writable(dtype: torch.dtype, tokens: int) -> None:
    store = new_store(torch.ones(1, dtype=dtype), (1, 2, tokens, 64))
    assert store.shape == (1, 2, tokens, 64)
    assert store.dtype == dtype
    assert not store.any()
    store[0, 1, -1] = 3
    assert store.sum() == 3 * 64


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are read from /proc")
def test_a_cache_layer_lies_outside_the_heap() -> None:
    states = torch.ones(1, 4, 1, 64)
    room = [torch.empty(MAPPED_BYTES * 16, dtype=torch.uint8) for _ in range(8)]
    del room  # free blocks of the heap, which an allocation of this size would take
    layer = FullLayer(1, 512)
    keys, _ = layer.update(states, states)
    maps = Path("/proc/self/maps").read_text().splitlines()
    heap = next((line for line in maps if line.endswith("[heap]")), "0-0 ")
    start, end = (int(part, 16) for part in heap.split()[0].split("-"))
    assert not start <= keys.data_ptr() < end


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is trimmed")
def test_the_heap_is_trimmed_once_it_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowmem.machine import monitor

    resident, trims = 100_000_000, []
    monkeypatch.setattr(monitor, "_resident_bytes", lambda: resident)
    monkeypatch.setattr(monitor, "trim_heap", lambda: trims.append(resident))
    trimmer = HeapTrimmer()
    trimmer.check()  # before the first block there is no limit
    trimmer.before_block()
    resident += HeapTrimmer.GROWTH
    trimmer.check()
    assert not trims
    resident += 1
    trimmer.check()
    trimmer.check()
    assert len(trims) == 1
    trimmer.before_block()  # what one block leaves is allowed from here on
    trimmer.before_block()
    assert len(trims) == 1
