"""Copies blocks from RAM to a GPU, each while the block before it computes.

Copies run from pinned memory on a CUDA stream of their own. Without CUDA the same steps run one after another, which is how
tests cover them on machines without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lowmem.machine.direct_io import page_aligned
from lowmem.models.checkpoint import as_bytes
from lowmem.planning.placement import SLOTS
from lowmem.runtime.streaming.blocks import BlockFile
from lowmem.runtime.streaming.ring import Check, nothing
from lowmem.runtime.streaming.streamer import Disk, Source, open_shards


class Ram:
    """Blocks held in RAM as the files store them."""

    def __init__(self, blocks: Sequence[BlockFile], pinned: bool) -> None:
        self.bytes_read = 0
        self._buffers: dict[int, Tensor] = {}
        shards = open_shards(blocks)
        try:
            for block in blocks:
                buffer = self._buffers[block.index] = page_aligned(block.nbytes, pinned)
                memory = as_bytes(buffer)
                for read in block.reads:
                    part = memory[read.position : read.position + read.length]
                    shards[read.file].read(read.offset, part, read.needed)
        finally:
            for shard in shards.values():
                shard.close()

    def acquire(self, index: int, _check: Check = nothing, /) -> Tensor:
        return self._buffers[index]

    def release(self, index: int) -> None:
        """The block stays in RAM."""

    def close(self) -> None:
        self._buffers.clear()


class Host:
    """Blocks of which some are in RAM and others on disk."""

    def __init__(self, ram: Sequence[BlockFile], disk: Sequence[BlockFile], pinned: bool) -> None:
        self._of: dict[int, Source] = {}
        self._sources: list[Source] = []
        try:
            if ram:
                self._add(Ram(ram, pinned), ram)
            if disk:
                self._add(Disk(disk, pinned), disk)
        except BaseException:
            self.close()
            raise

    def _add(self, source: Source, blocks: Sequence[BlockFile]) -> None:
        self._sources.append(source)
        self._of |= {block.index: source for block in blocks}

    @property
    def bytes_read(self) -> int:
        return sum(source.bytes_read for source in self._sources)

    def acquire(self, index: int, check: Check = nothing, /) -> Tensor | None:
        return self._of[index].acquire(index, check)

    def release(self, index: int) -> None:
        self._of[index].release(index)

    def close(self) -> None:
        for source in self._sources:
            source.close()


class _Buffer:
    """Memory for one block on the device, and the events that order its use."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.index = -1
        self.copied = _Mark(device)
        self.used = _Mark(device)


class _Mark:
    """A CUDA event; does nothing on other devices, where all work runs in order."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None

    def record(self, stream: Any) -> None:
        if self._event is not None:
            self._event.record(stream)

    def wait(self, stream: Any) -> None:
        if self._event is not None:
            stream.wait_event(self._event)

    def synchronize(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class OnDevice:
    """Copies blocks from `host` into two buffers on the device: one computes while the other is filled.

    Args:
        blocks: all streamed blocks in order; after the last comes the first again.
    """

    def __init__(self, host: Source, blocks: Sequence[BlockFile], device: torch.device) -> None:
        self._host, self._device = host, device
        self._sizes: Mapping[int, int] = {block.index: block.nbytes for block in blocks}
        order = [block.index for block in blocks]
        self._after = dict(zip(order, [*order[1:], *order[:1]], strict=True))
        size = max(self._sizes.values())
        self._buffers = [_Buffer(size, device) for _ in range(min(SLOTS, len(blocks)))]
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._check: Check = nothing
        self.copied_bytes = 0

    @property
    def bytes_read(self) -> int:
        """Bytes copied to the device."""
        return self.copied_bytes

    def acquire(self, index: int, check: Check = nothing, /) -> Tensor:
        self._check = check  # for the prefetched block, too
        buffer = self._holding(index) or self._copy(index)
        buffer.copied.wait(self._compute_stream())
        return buffer.bytes

    def release(self, index: int) -> None:
        """Called once the kernels of block `index` are queued: its buffer is free after them, and the next block is prefetched."""
        buffer = self._holding(index)
        if buffer is None:
            return
        buffer.used.record(self._compute_stream())
        if self._holding(self._after[index]) is None:
            self._copy(self._after[index], keep=index)

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.copied.synchronize()
        self._buffers.clear()
        self._host.close()

    def _holding(self, index: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.index == index), None)

    def _copy(self, index: int, keep: int = -1) -> _Buffer:
        buffer = next((b for b in self._buffers if b.index != keep), self._buffers[0])
        source = self._host.acquire(index, self._check)
        assert source is not None  # a host lends bytes
        buffer.used.wait(self._stream)
        with self._copying():
            size = self._sizes[index]
            buffer.bytes[:size].copy_(source[:size], non_blocking=True)
            buffer.copied.record(self._stream)
        buffer.index = index
        self.copied_bytes += size
        # The host's buffer may be refilled once it has been copied; kernels keep running meanwhile.
        buffer.copied.synchronize()
        self._host.release(index)
        return buffer

    def _compute_stream(self) -> Any:
        return torch.cuda.current_stream(self._device) if self._stream is not None else None

    def _copying(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()
