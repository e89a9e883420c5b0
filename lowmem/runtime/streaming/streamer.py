"""Blocks of a live model that are elsewhere, and pass through the device's memory when they compute.

A block is the same module all the time. In front of its forward pass its members become views into a buffer that holds the
stored bytes; behind it the buffer goes back and the next block starts to arrive. Nothing here knows families or plans.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.kernels.stored_layers import StoredLinear, StoredNf4, StoredPacked, forget_scratch
from lowmem.machine.direct_io import Shard
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.modules import set_tensor
from lowmem.runtime.streaming.blocks import BlockFile, Weight
from lowmem.runtime.streaming.ring import Check, Ring, nothing

log = logging.getLogger("lowmem.offload")

AS_STORED = (StoredLinear, StoredNf4, StoredPacked)
"""Modules that compute with whatever dtype their weights are stored in."""


class Source(Protocol):
    """Where a block's bytes come from: `acquire` lends them as a uint8 tensor until `release`; None: they are there."""

    @property
    def bytes_read(self) -> int: ...

    def acquire(self, index: int, check: Check = nothing, /) -> Tensor | None: ...

    def release(self, index: int) -> None: ...

    def close(self) -> None: ...


class Streamer:
    """Streams blocks of a model; made by `attach`, ended by `detach`.

    Args:
        modules: the decoder's blocks by index.
        blocks: those that stream, in order.
        source: what lends their bytes.
        device, dtype: of the computation.

    Attributes:
        check: called while a pass waits for bytes; what it raises ends the pass.
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

    @property
    def bytes_per_pass(self) -> int:
        """Bytes that one pass through the model needs of the blocks elsewhere."""
        return sum(block.stored_bytes for block in self.blocks)

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
        # Also after a pass that was broken off, or its buffer would be lost.
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def close(self) -> None:
        """Unhook the model and stop reading; its streamed blocks are empty from then on. Idempotent."""
        while self._handles:
            self._handles.pop().remove()
        self.source.close()
        forget_scratch()


class _Bound:
    """The members of one block: stand-ins, or views into the buffer it was bound to.

    A stand-in has the shape of its weight and the memory of one number, so that a model still knows its size and device.
    """

    def __init__(self, block: BlockFile, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._dtype = block.weights, dtype
        self._stand_ins = [_stand_in(weight, device) for weight in block.weights]
        if any(_member(weight) is None or _member(weight).is_meta for weight in block.weights):
            self.unbind()

    def bind(self, buffer: Tensor) -> None:
        for weight in self._weights:
            assign(weight, weight.view(buffer), self._dtype)

    def unbind(self) -> None:
        for weight, stand_in in zip(self._weights, self._stand_ins, strict=True):
            set_tensor(weight.module, weight.member, stand_in)


def _stand_in(weight: Weight, device: torch.device) -> nn.Parameter:
    one = torch.zeros((), dtype=TORCH_DTYPES[weight.entry.dtype], device=device)
    return nn.Parameter(one.expand(weight.entry.shape), requires_grad=False)


def _member(weight: Weight) -> Any:
    return weight.module._parameters.get(weight.member, weight.module._buffers.get(weight.member))


def assign(weight: Weight, tensor: Tensor, dtype: torch.dtype) -> None:
    """Make `tensor` a member of its module, in `dtype` unless the module takes what is stored."""
    if not isinstance(weight.module, AS_STORED) and tensor.is_floating_point() and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    set_tensor(weight.module, weight.member, tensor)


class Disk:
    """Blocks read from their files into a ring of buffers, past the page cache."""

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
    """Blocks used in place, where the page cache holds their files: nothing is copied, nothing kept twice.

    Only for weights that are stored in the dtype of the computation, on a CPU. A file is looked at before each block: reading
    a page that was cut off would end the process.
    """

    def __init__(self, blocks: Sequence[BlockFile], dtype: torch.dtype) -> None:
        self.bytes_read = 0
        self._shards = open_shards(blocks)
        self._files = {block.index: {read.file for read in block.reads} for block in blocks}
        pages = {path: torch.frombuffer(shard.map(), dtype=torch.uint8) for path, shard in self._shards.items()}
        for block in blocks:
            for weight in block.weights:
                start = weight.entry.offset
                at = Weight(weight.module, weight.member, weight.entry, start)
                assign(weight, at.view(pages[weight.entry.file]), dtype)

    def acquire(self, index: int, _check: Check = nothing, /) -> None:
        for file in self._files[index]:
            self._shards[file].check()

    def release(self, index: int) -> None:
        """Nothing was lent."""

    def close(self) -> None:
        _close(self._shards)


def open_shards(blocks: Iterable[BlockFile]) -> dict[Path, Shard]:
    """One open file for each that the blocks lie in."""
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
