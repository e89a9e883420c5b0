"""Where the bytes of a block are in its files and in a buffer.

Adjacent tensors of a file are read as one range. A range has the same offset within a page in the buffer as in the file, so
direct I/O needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowmem.machine.direct_io import CHUNK_BYTES, PAGE
from lowmem.models.checkpoint import TORCH_DTYPES, Entry

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
    """A stored tensor and the parameter of a module that it fills; `position` is its first byte in the buffer."""

    module: nn.Module
    member: str
    entry: Entry
    position: int

    def view(self, buffer: Tensor) -> Tensor:
        """The stored tensor within `buffer` (uint8), a view unless its bytes are not aligned to its dtype."""
        dtype = TORCH_DTYPES[self.entry.dtype]
        raw = buffer[self.position : self.position + self.entry.nbytes]
        if raw.data_ptr() % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(self.entry.shape)


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


Member = tuple[nn.Module, str, Entry]


def block_file(index: int, members: Iterable[Member]) -> BlockFile:
    """Lay out one block from (module, member, where it is stored)."""
    weights: list[Weight] = []
    reads: list[Read] = []
    position = 0
    for run in _runs(sorted(members, key=lambda m: (str(m[2].file), m[2].offset))):
        start = run[0][2].offset // PAGE * PAGE
        end = max(entry.offset + entry.nbytes for _, _, entry in run)
        weights += [Weight(module, member, entry, position + entry.offset - start) for module, member, entry in run]
        reads += _reads(run[0][2].file, start, end, position)
        position += -(-end // PAGE) * PAGE - start
    return BlockFile(index, tuple(weights), tuple(reads), position)


def _runs(ordered: list[Member]) -> list[list[Member]]:
    """Group tensors that are adjacent in a file."""
    runs: list[list[Member]] = []
    for member in ordered:
        entry, last = member[2], runs[-1][-1][2] if runs else None
        if last is None or last.file != entry.file or entry.offset - last.offset - last.nbytes > GAP_BYTES:
            runs.append([])
        runs[-1].append(member)
    return runs


def _reads(file: Path, start: int, end: int, position: int) -> list[Read]:
    stop = -(-end // PAGE) * PAGE
    spans = ((offset, min(CHUNK_BYTES, stop - offset)) for offset in range(start, stop, CHUNK_BYTES))
    return [
        Read(file, offset, length, position + offset - start, min(length, end - offset)) for offset, length in spans
    ]
