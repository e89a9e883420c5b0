"""Where the tensors of a checkpoint come from: bytes of its files as they are, joined or cut, or what is computed of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e8m0": torch.float8_e8m0fnu,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class Extent(NamedTuple):
    """`nbytes` of `file` from `offset` on."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor whose bytes are those of its extents, one after the other: one extent as stored, several once joined."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    def rows(self, start: int, stop: int) -> Entry:
        """The rows `start` to `stop` (exclusive) along the first dimension."""
        row = self.nbytes // self.shape[0]
        return Entry(self.dtype, (stop - start, *self.shape[1:]), tuple(self._cut(start * row, stop * row)))

    def _cut(self, start: int, stop: int) -> Iterator[Extent]:
        for file, offset, nbytes in self.extents:
            first, last = max(start, 0), min(stop, nbytes)
            if first < last:
                yield Extent(file, offset + first, last - first)
            start, stop = start - nbytes, stop - nbytes


@dataclass(frozen=True, slots=True)
class Converted:
    """A tensor that is computed from stored ones.

    Args:
        convert: the tensor of this shape, or rows of it, given the tensors of `sources` or the same rows of them.
        steps: for each source how many rows of the tensor belong to a row of it, 0 if all rows need all of it; empty if the
            tensor can only be computed as a whole.
    """

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    convert: Callable[[list[torch.Tensor]], torch.Tensor]
    steps: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    @property
    def step(self) -> int:
        """The rows that are computed together, at least."""
        return max(self.steps, default=self.shape[0])

    def rows(self, start: int, stop: int) -> Converted:
        shape = (stop - start, *self.shape[1:])
        if not self.steps or start % self.step:
            return Converted(self.dtype, shape, self.sources, lambda tensors: self.convert(tensors)[start:stop])
        sources = tuple(
            source.rows(start // step, -(-stop // step)) if step else source
            for source, step in zip(self.sources, self.steps, strict=True)
        )
        if stop == self.shape[0] or stop % self.step == 0:
            return Converted(self.dtype, shape, sources, self.convert, self.steps)
        return Converted(self.dtype, shape, sources, lambda tensors: self.convert(tensors)[: stop - start])


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor whose elements are those of `parts`, one part after the other, some of which are computed."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Source, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int) -> Joined:
        row = math.prod(self.shape[1:])
        return Joined(self.dtype, (stop - start, *self.shape[1:]), tuple(self._cut(start * row, stop * row)))

    def _cut(self, start: int, stop: int) -> Iterator[Source]:
        for part in self.parts:
            size, row = math.prod(part.shape), math.prod(part.shape[1:])
            first, last = max(start, 0), min(stop, size)
            if first < last:
                yield part if (first, last) == (0, size) else part.rows(first // row, last // row)
            start, stop = start - size, stop - size


Source = Entry | Converted | Joined
"""Where a tensor comes from."""
