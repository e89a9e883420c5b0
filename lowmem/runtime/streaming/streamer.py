"""Streams offloaded blocks of a model through the memory of the device that computes.

A block's module stays in the model. Before its forward pass its parameters become views into a buffer with the stored bytes;
afterwards the buffer is released and the next block starts to load.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.kernels.stored_layers import StoredLinear, StoredNf4, StoredPacked, free_scratch
from lowmem.machine.direct_io import Shard
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.modules import set_tensor
from lowmem.runtime.streaming.blocks import BlockFile, Weight, extents
from lowmem.runtime.streaming.ring import Check, Ring, nothing

log = logging.getLogger("lowmem.offload")

AS_STORED = (StoredLinear, StoredNf4, StoredPacked)
"""Modules that compute with whatever dtype their weights are stored in."""


class Source(Protocol):
    """Where the bytes of blocks come from.

    `acquire` lends those of one block as a uint8 tensor until `release`, or returns None if its weights are in place already.
    """

    @property
    def bytes_read(self) -> int: ...

    def acquire(self, index: int, check: Check = nothing, /) -> Tensor | None: ...

    def release(self, index: int) -> None: ...

    def close(self) -> None: ...


class Streamer:
    """Streams blocks of a model from its creation until `close`.

    Args:
        modules: the decoder's blocks by index.
        blocks: those that stream, in order.
        source: where their bytes come from.
        device, dtype: of the computation.

    Attributes:
        check: called while a forward pass waits for bytes; an exception ends the pass.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        blocks: Sequence[BlockFile],
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.blocks, self.source = tuple(blocks), source
        self.check: Check = nothing
        self._handles: list[Any] = []
        for block in blocks:
            self._hook(modules[block.index], _Bound(block, device, dtype), block.index)

    @property
    def bytes_read(self) -> int:
        """Bytes fetched so far, from disk or RAM."""
        return self.source.bytes_read

    def _hook(self, module: nn.Module, bound: _Bound, index: int) -> None:
        buffered = not isinstance(self.source, Mapped)

        def enter(_module: nn.Module, _inputs: tuple[object, ...]) -> None:
            buffer = self.source.acquire(index, self.check)
            if buffer is not None:
                bound.bind(buffer)

        def leave(_module: nn.Module, _inputs: tuple[object, ...], _result: object) -> None:
            if buffered:
                bound.unbind()
            self.source.release(index)

        self._handles.append(module.register_forward_pre_hook(enter))
        # Also after a pass that was interrupted, or its buffer would be lost.
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Remove the hooks and stop reading; the streamed blocks are empty from then on. Idempotent."""
        while self._handles:
            self._handles.pop().remove()
        self.source.close()
        free_scratch()


class _Bound:
    """The parameters of one block: placeholders, or views into the buffer it is bound to.

    A placeholder has the shape of its weight and the memory of one number, so that the model's size and device stay known.
    """

    def __init__(self, block: BlockFile, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._dtype = block.weights, dtype
        self._placeholders = [_placeholder(weight, device) for weight in block.weights]
        if any(_member(weight) is None or _member(weight).is_meta for weight in block.weights):
            self.unbind()

    def bind(self, buffer: Tensor) -> None:
        for weight in self._weights:
            assign(weight, weight.view(buffer), self._dtype)

    def unbind(self) -> None:
        for weight, placeholder in zip(self._weights, self._placeholders, strict=True):
            set_tensor(weight.module, weight.member, placeholder)


def _placeholder(weight: Weight, device: torch.device) -> nn.Parameter:
    one = torch.zeros((), dtype=TORCH_DTYPES[weight.entry.dtype], device=device)
    return nn.Parameter(one.expand(weight.entry.shape), requires_grad=False)


def _member(weight: Weight) -> Any:
    return weight.module._parameters.get(weight.member, weight.module._buffers.get(weight.member))


def assign(weight: Weight, tensor: Tensor, dtype: torch.dtype) -> None:
    """Set a parameter of a module to `tensor`, converted to `dtype` unless the module computes with stored weights."""
    if not isinstance(weight.module, AS_STORED) and tensor.is_floating_point() and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    set_tensor(weight.module, weight.member, tensor)


class Disk:
    """Blocks read from their files into a ring of buffers, bypassing the page cache."""

    def __init__(self, blocks: Sequence[BlockFile], pinned: bool = False) -> None:
        self._shards = open_shards(blocks)
        try:
            self._ring = Ring(blocks, self._shards, pinned)
        except BaseException:
            _close(self._shards)
            raise

    def acquire(self, index: int, check: Check = nothing, /) -> Tensor:
        return self._ring.acquire(index, check)

    def release(self, index: int) -> None:
        self._ring.release(index)

    @property
    def bytes_read(self) -> int:
        return self._ring.bytes_read

    def close(self) -> None:
        self._ring.close()
        _close(self._shards)


class Mapped:
    """Blocks used in place from memory-mapped files: nothing is copied or held twice.

    Only on a CPU, for weights stored in the compute dtype. Each file is checked before each block, since touching a page of a
    truncated file would kill the process.
    """

    def __init__(self, blocks: Sequence[BlockFile], dtype: torch.dtype) -> None:
        self.bytes_read = 0
        self._shards = open_shards(blocks)
        self._files = {block.index: {read.file for read in block.reads} for block in blocks}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")  # weights are only read
            pages = {path: torch.frombuffer(shard.map(), dtype=torch.uint8) for path, shard in self._shards.items()}
        for block in blocks:
            for weight in block.weights:
                (extent,) = extents(weight.entry)
                at = Weight(weight.module, weight.member, weight.entry, (extent.offset,))
                assign(weight, at.view(pages[extent.file]), dtype)

    def acquire(self, index: int, _check: Check = nothing, /) -> None:
        for file in self._files[index]:
            self._shards[file].check()

    def release(self, index: int) -> None:
        """Nothing to release."""

    def close(self) -> None:
        _close(self._shards)


def open_shards(blocks: Iterable[BlockFile]) -> dict[Path, Shard]:
    """Open every file that holds part of the blocks."""
    shards: dict[Path, Shard] = {}
    try:
        for block in blocks:
            for read in block.reads:
                if read.file not in shards:
                    shards[read.file] = Shard(read.file)
    except BaseException:
        _close(shards)
        raise
    return shards


def _close(shards: Mapping[Path, Shard]) -> None:
    for shard in shards.values():
        shard.close()
