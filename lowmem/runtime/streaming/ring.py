"""A ring of buffers that reader threads keep filled with the next blocks.

Blocks are needed in a cycle: after the last comes the first again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lowmem.background import ThreadPool
from lowmem.machine.direct_io import Shard, page_aligned
from lowmem.models.checkpoint import as_bytes
from lowmem.planning.placement import SLOTS
from lowmem.runtime.streaming.blocks import BlockFile

READERS = 2
"""Threads that read: one request is always waiting while another is served."""


Check = Callable[[], None]
"""Called while a forward pass waits for bytes; an exception ends the wait."""


def nothing() -> None:
    """The check that never raises."""


@dataclass(slots=True)
class _Slot:
    buffer: Tensor
    block: BlockFile | None = None
    pending: list[Future[None]] = field(default_factory=list)


class Ring:
    """Lends the buffers of blocks by `acquire` and `release`; fast in the blocks' order, correct in any.

    Args:
        blocks: in the order in which they are needed.
        pinned: use pinned buffers, from which a GPU copies asynchronously.
    """

    def __init__(self, blocks: Sequence[BlockFile], shards: Mapping[Path, Shard], pinned: bool = False) -> None:
        self._blocks, self._shards = list(blocks), shards
        size = max(block.nbytes for block in blocks)
        self._free = [_Slot(page_aligned(size, pinned)) for _ in range(min(SLOTS, len(blocks)))]
        self._filling: deque[_Slot] = deque()
        self._lent: dict[int, _Slot] = {}
        self._next = 0
        self._readers = ThreadPool(READERS)
        self._end_readers = weakref.finalize(self, self._readers.shutdown, cancel_futures=True)
        self.bytes_read = 0

    def acquire(self, index: int, check: Check = nothing) -> Tensor:
        """The buffer with block `index` (uint8), valid until `release`.

        Raises:
            CorruptModel, ModelNotFound: its files have changed or cannot be read.
        """
        if not self._filling or self._filling[0].block is None or self._filling[0].block.index != index:
            self._restart(index)
        slot = self._filling.popleft()
        self._lent[index] = slot
        try:
            for read in slot.pending:
                check()
                read.result()
        except BaseException:
            _abandon(slot)
            self.release(index)
            self._stop()
            raise
        return slot.buffer

    def release(self, index: int) -> None:
        """Return the buffer of block `index`, which is refilled with a later block. No-op for a block that is not lent."""
        slot = self._lent.pop(index, None)
        if slot is not None:
            self._free.append(slot)
            self._fill()

    def close(self) -> None:
        """Stop reading and free the buffers. Idempotent."""
        self._end_readers()
        self._free.clear()
        self._filling.clear()
        self._lent.clear()

    def _restart(self, index: int) -> None:
        """Start over at block `index`: after an interrupted pass, the prefetched blocks are not the ones needed."""
        self._stop()
        for lent in list(self._lent):
            self._free.append(self._lent.pop(lent))
        self._next = next(place for place, block in enumerate(self._blocks) if block.index == index)
        self._fill()

    def _stop(self) -> None:
        while self._filling:
            slot = self._filling.popleft()
            _abandon(slot)
            self._free.append(slot)

    def _fill(self) -> None:
        while self._free:
            slot = self._free.pop()
            slot.block = block = self._blocks[self._next]
            self._next = (self._next + 1) % len(self._blocks)
            memory = as_bytes(slot.buffer)
            slot.pending = [self._readers.submit(self._check, block)]
            for read in block.reads:
                part = memory[read.position : read.position + read.length]
                slot.pending.append(self._readers.submit(self._shards[read.file].read, read.offset, part, read.needed))
            self.bytes_read += block.nbytes
            self._filling.append(slot)

    def _check(self, block: BlockFile) -> None:
        for file in {read.file for read in block.reads}:
            self._shards[file].check()


def _abandon(slot: _Slot) -> None:
    """Cancel the reads into this buffer that have not started, and wait for the others."""
    for read in slot.pending:
        read.cancel()
    wait(slot.pending)
