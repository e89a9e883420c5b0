"""Writing safetensors one tensor at a time, so that no more than one is in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from lowmem.models.checkpoint import TORCH_DTYPES, as_bytes
from lowmem.models.model_files import INDEX
from lowmem.models.safetensors_header import DTYPES
from lowmem.units import GB

HEADER_ROOM = 1 << 20
"""Bytes reserved for the header, which is known only at the end: enough for about 8,000 tensors."""

_NAMES = {TORCH_DTYPES[ours]: theirs for theirs, ours in DTYPES.items()}

Named = Iterable[tuple[str, torch.Tensor]]


def write_shards(folder: Path, tensors: Named, shard_bytes: int = 2 * GB) -> int:
    """Write a model's weights as `model.safetensors`, or as numbered shards with an index. Returns the total bytes.

    A shard ends before the tensor that would take it above `shard_bytes`. Headers are padded with spaces to
    `HEADER_ROOM`, as the format allows.

    Raises:
        ValueError: duplicate names in a shard, or more tensors than a header has room for.
    """
    shards: list[_Writer] = []
    rest = iter(tensors)
    waiting = next(rest, None)
    while waiting or not shards:
        with _writing(folder / f"shard-{len(shards)}.tmp") as writer:
            while waiting and (not writer.position or writer.position + waiting[1].nbytes <= shard_bytes):
                writer.add(*waiting)
                waiting = next(rest, None)
        shards.append(writer)
    _name_shards(folder, shards)
    return sum(shard.size for shard in shards)


def shard_names(count: int) -> list[str]:
    """The names of the weight files of a model with so many."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _name_shards(folder: Path, shards: list[_Writer]) -> None:
    weight_map: dict[str, str] = {}
    for shard, final in zip(shards, shard_names(len(shards)), strict=True):
        shard.path.replace(folder / final)
        weight_map |= dict.fromkeys(shard.entries, final)
    if len(shards) == 1:
        return
    index = {"metadata": {"total_size": sum(shard.position for shard in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[_Writer]:
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as out:
            writer = _Writer(path, out)
            yield writer
            writer.finish()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Writer:
    """A file being written; `position` counts the bytes of the tensors."""

    def __init__(self, path: Path, out: BinaryIO) -> None:
        self.path, self._out = path, out
        self.entries: dict[str, object] = {}
        self.position = 0
        out.seek(8 + HEADER_ROOM)

    @property
    def size(self) -> int:
        return 8 + HEADER_ROOM + self.position

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.entries:
            raise ValueError(f"two tensors are called {name}")
        tensor = tensor.detach().cpu().contiguous()
        end = self.position + tensor.nbytes
        if tensor.numel():
            self._out.write(as_bytes(tensor))
        offsets = [self.position, end]
        self.entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        self.position = end

    def finish(self) -> None:
        text = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        if len(text) > HEADER_ROOM:
            raise ValueError(f"the header of {self.path.name} needs {len(text):,} bytes, above {HEADER_ROOM:,}")
        self._out.seek(0)
        self._out.write(HEADER_ROOM.to_bytes(8, "little") + text.ljust(HEADER_ROOM))
