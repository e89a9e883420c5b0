"""The weight files of an unfinished checkpoint, which a later process can continue where a killed one stopped.

Shards grow in place and get header and name at the end, so nothing is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.checkpoint_writer import HEADER_ROOM, _name_shards, _Writer, shard_names
from lowmem.quant.estimate import SHARD_BYTES
from lowmem.quant.journal import Shard

_DATA_START = 8 + HEADER_ROOM


class Shards:
    """safetensors files of a model in `folder`; `state` describes them for a later `Shards` to continue."""

    def __init__(self, folder: Path, state: Sequence[Shard] = ()) -> None:
        """Open new files, or those of an earlier `state`, truncated to what it describes.

        Raises:
            CorruptModel: a file is missing or shorter than `state` says.
        """
        self._folder = folder
        self._writers: list[_Writer] = []
        self._out: BinaryIO | None = None
        for described, name in zip(state, shard_names(len(state)), strict=True):
            if (folder / name).exists():  # the run ended between `finish` and the end
                (folder / name).replace(self._path)
            self._open(described)

    @property
    def _path(self) -> Path:
        """Of the next file, until `finish`."""
        return self._folder / f"shard-{len(self._writers)}.tmp"

    def _open(self, described: Shard | None = None) -> None:
        self._close()
        path = self._path
        position = described.position if described else 0
        size = path.stat().st_size if path.is_file() else 0
        if described and (position < 0 or size < _DATA_START + position):
            raise CorruptModel(
                msg(
                    "{path} in {folder} has {size:,} bytes, but its journal says {data_start:,}.",
                    path=path.name,
                    folder=self._folder.name,
                    size=size,
                    data_start=_DATA_START + position,
                ),
                msg("Delete {folder} and start again.", folder=self._folder),
            )
        out = path.open("r+b" if described else "w+b")
        self._out = out
        writer = _Writer(path, out)
        if described:
            out.truncate(_DATA_START + position)
            out.seek(_DATA_START + position)
            writer.entries, writer.position = dict(described.entries), position
        self._writers.append(writer)

    def add(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Append tensors; a new shard begins where the last would grow beyond `SHARD_BYTES`."""
        for name, tensor in tensors:
            full = self._writers and self._writers[-1].position + tensor.nbytes > SHARD_BYTES
            if not self._writers or (full and self._writers[-1].position):
                self._open()
            self._writers[-1].add(name, tensor)

    def state(self) -> list[Shard]:
        """Flush, and return plain data that describes everything added so far."""
        if self._out is not None:
            self._out.flush()
        return [Shard(writer.entries, writer.position) for writer in self._writers]

    def finish(self) -> int:
        """Write headers and index and rename the files; returns their total bytes."""
        for writer in self._writers:
            self._close()
            with writer.path.open("r+b") as out:
                header = _Writer(writer.path, out)
                header.entries, header.position = writer.entries, writer.position
                header.finish()
        _name_shards(self._folder, self._writers)
        return sum(writer.size for writer in self._writers)

    def _close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None

    def close(self) -> None:
        """Close the open file; idempotent. Files on disk stay."""
        self._close()
