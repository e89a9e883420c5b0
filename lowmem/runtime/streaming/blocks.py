"""Where the bytes of a block are in its files and in a buffer.

Adjacent tensors of a file are read as one range. A range has the same offset within a page in the buffer as in the file, so
direct I/O needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem.machine.direct_io import CHUNK_BYTES, PAGE
from lowmem.models.entries import TORCH_DTYPES, Converted, Entry, Extent, Joined, Source

GAP_BYTES = 1 << 16
"""A smaller gap between two tensors of a block is read along with them."""


@dataclass(frozen=True, slots=True)
class Read:
    """One read of whole pages: `length` bytes of `file` at `offset` into the buffer at `position`; `needed` of them must exist."""

    file: Path
    offset: int
    length: int
    position: int
    needed: int


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor and the parameter of a module that it fills.

    `positions`: the first byte in the buffer of each extent of `entry`, or of those of its sources.
    """

    module: nn.Module
    member: str
    entry: Source
    positions: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor within `buffer` (uint8): a view if it is one extent whose bytes are aligned to its dtype."""
        return _tensor(self.entry, buffer, iter(self.positions))


def _tensor(entry: Source, buffer: Tensor, places: Iterator[int]) -> Tensor:
    if isinstance(entry, Converted):
        return entry.convert([_tensor(source, buffer, places) for source in entry.sources])
    if isinstance(entry, Joined):
        return torch.cat([_tensor(part, buffer, places).flatten() for part in entry.parts]).view(entry.shape)
    dtype = TORCH_DTYPES[entry.dtype]
    parts = [buffer[place : place + extent.nbytes] for extent, place in zip(entry.extents, places, strict=False)]
    raw = parts[0] if len(parts) == 1 else torch.cat(parts)
    if raw.data_ptr() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(entry.shape)


def extents(entry: Source) -> tuple[Extent, ...]:
    """Everything that is read for a tensor."""
    if isinstance(entry, Entry):
        return entry.extents
    sources = entry.sources if isinstance(entry, Converted) else entry.parts
    return tuple(extent for source in sources for extent in extents(source))


@dataclass(frozen=True, slots=True)
class BlockFile:
    """The reads that load one block, and the weights that the bytes then are."""

    index: int
    weights: tuple[Weight, ...]
    reads: tuple[Read, ...]
    nbytes: int

    @property
    def stored_bytes(self) -> int:
        return sum(weight.entry.nbytes for weight in self.weights)


Member = tuple[nn.Module, str, Source]


def block_file(index: int, members: Iterable[Member]) -> BlockFile:
    """Lay out one block from (module, member, where it is stored)."""
    listed = list(members)
    places: dict[Extent, int] = {}
    reads: list[Read] = []
    position = 0
    for run in _runs(sorted({extent for _, _, entry in listed for extent in extents(entry)})):
        file, start = run[0].file, run[0].offset // PAGE * PAGE
        end = max(extent.offset + extent.nbytes for extent in run)
        places |= {extent: position + extent.offset - start for extent in run}
        reads += _reads(file, start, end, position)
        position += -(-end // PAGE) * PAGE - start
    weights = [
        Weight(module, member, entry, tuple(places[extent] for extent in extents(entry)))
        for module, member, entry in listed
    ]
    return BlockFile(index, tuple(weights), tuple(reads), position)


def _runs(ordered: list[Extent]) -> list[list[Extent]]:
    """Group extents that are adjacent in a file."""
    runs: list[list[Extent]] = []
    for extent in ordered:
        last = runs[-1][-1] if runs else None
        if last is None or last.file != extent.file or extent.offset - last.offset - last.nbytes > GAP_BYTES:
            runs.append([])
        runs[-1].append(extent)
    return runs


def _reads(file: Path, start: int, end: int, position: int) -> list[Read]:
    stop = -(-end // PAGE) * PAGE
    spans = ((offset, min(CHUNK_BYTES, stop - offset)) for offset in range(start, stop, CHUNK_BYTES))
    return [
        Read(file, offset, length, position + offset - start, min(length, end - offset)) for offset, length in spans
    ]
