"""Reads the weights of a folder of safetensors files, one tensor at a time."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.dequantize import dequantize_entries
from lowmem.models.entries import TORCH_DTYPES, Converted, Entry, Extent, Joined, Source
from lowmem.models.files import LocalFile, LocalFolder, read_object
from lowmem.models.model_files import CONFIG, weight_files
from lowmem.models.quantization import description
from lowmem.models.safetensors_header import read_header
from lowmem.models.spec import CONVERSION_BYTES, conversion_bytes
from lowmem.models.tied_head import Place, copied_head


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared; also of dtypes that numpy lacks."""
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class Checkpoint:
    """The safetensors files of a folder, opened once each. Safe to read from several threads.

    Files are read, not mapped: a mapped page counts as memory of the process for as long as the kernel likes, which no
    budget could account for.

    Raises:
        ModelNotFound, UnsafeModel, CorruptModel, Unsupported: on opening, see `weight_files` and `read_header`.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Source] = {}
        self._files: dict[Path, _OpenFile] = {}
        try:
            files = LocalFolder(folder)
            for name in weight_files(files):
                self._open(folder / name)
            config = read_object(files, CONFIG) if CONFIG in files.names else {}
            self.tensors.pop(copied_head(config, self.tensors, self._place), None)
            dequantize_entries(self.tensors, description(files, config) or {})
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        self._files[path] = _OpenFile(path)
        header = read_header(LocalFile(path))
        for tensor in header.tensors:
            offset = header.offsets[tensor.name]
            extent = Extent(path, offset, tensor.nbytes)
            self.tensors[tensor.name] = Entry(tensor.dtype, tensor.shape, (extent,))

    def _place(self, name: str) -> Place:
        entry = self.tensors[name]
        assert isinstance(entry, Entry)  # nothing has been joined yet
        file, offset, nbytes = entry.extents[0]
        return LocalFile(file), offset, nbytes

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor, on the CPU, in its stored dtype or converted to `dtype`.

        Raises:
            KeyError: no such tensor.
            CorruptModel: the file was truncated or changed since it was opened.
        """
        return self.read_entry(self.tensors[name], dtype)

    def read_entry(self, entry: Source, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`read` for a tensor of `tensors`, or for rows of one."""
        if isinstance(entry, Converted) and (dtype is None or not entry.steps):
            tensor = entry.convert([self.read_entry(source) for source in entry.sources])
            return tensor if dtype is None else tensor.to(dtype)
        return self._into(entry, torch.empty(entry.shape, dtype=dtype or TORCH_DTYPES[entry.dtype]))

    def read_into(self, name: str, out: torch.Tensor) -> torch.Tensor:
        """Fill `out` (same shape; any dtype, device or strides) and return it.

        Reads straight into `out` if it has the stored layout, else through a chunk of at most `CONVERSION_BYTES`, or one row.
        """
        entry = self.tensors[name]
        if tuple(out.shape) != tuple(entry.shape):
            raise ValueError(f"{name} is {entry.shape}, the destination {tuple(out.shape)}")
        return self._into(entry, out)

    def _into(self, entry: Source, out: torch.Tensor) -> torch.Tensor:
        if isinstance(entry, Entry):
            return self._fill(entry, out)
        if isinstance(entry, Joined):
            start, rows = 0, out if entry.parts[0].shape[1:] == entry.shape[1:] else out.flatten(0, 1)
            for part in entry.parts:
                self._into(part, rows[start : start + part.shape[0]])
                start += part.shape[0]
            return out
        row_bytes = 2 * math.prod(entry.shape[1:]) * TORCH_DTYPES[entry.dtype].itemsize  # and what it is computed of
        step = (
            max(1, CONVERSION_BYTES // max(1, row_bytes * entry.step)) * entry.step if entry.steps else entry.shape[0]
        )
        for start in range(0, entry.shape[0], step):
            stop = min(start + step, entry.shape[0])
            out[start:stop].copy_(self.read_entry(entry.rows(start, stop)))
        return out

    def _fill(self, entry: Entry, out: torch.Tensor) -> torch.Tensor:
        stored = TORCH_DTYPES[entry.dtype]
        if out.dtype == stored and out.is_contiguous() and out.device.type == "cpu":
            self._read_bytes(entry, 0, out)
            return out
        rows = out if out.dim() else out.view(1)
        row_bytes = max(1, entry.nbytes // max(1, rows.shape[0]))
        # Equal chunks: while the first is mapped, the result is there, too.
        step = max(1, math.ceil(conversion_bytes(entry.nbytes) / row_bytes))
        for start in range(0, rows.shape[0], step):
            part = rows[start : start + step]
            chunk = torch.empty(part.shape, dtype=stored)
            self._read_bytes(entry, start * row_bytes, chunk)
            part.copy_(chunk)
            del chunk  # before the next one is mapped
        return out

    def _read_bytes(self, entry: Entry, skip: int, tensor: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with the entry's bytes from `skip` on."""
        if not tensor.numel():
            return
        memory, done = as_bytes(tensor), 0
        for file, offset, nbytes in entry.extents:
            if skip < nbytes and done < len(memory):
                count = min(nbytes - skip, len(memory) - done)
                self._files[file].read_into(offset + skip, memory[done : done + count])
                done += count
            skip = max(0, skip - nbytes)

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OpenFile:
    """A file that must not change while it is open: its size and modification time are checked before every read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)
        self._state = self._stat()
        self._seek = threading.Lock()

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def read_into(self, offset: int, memory: memoryview) -> None:
        if self._stat() != self._state:
            raise self._changed()
        done = 0
        while done < len(memory):
            count = self._read_some(offset + done, memory[done : done + CONVERSION_BYTES])
            if not count:
                raise self._changed()
            done += count

    def _read_some(self, offset: int, memory: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [memory], offset)
        with self._seek:  # Windows has no positioned read
            self._file.seek(offset)
            return self._file.readinto(memory) or 0

    def _changed(self) -> CorruptModel:
        size = os.fstat(self._file.fileno()).st_size
        return CorruptModel(
            msg(
                "{path} changed while it was read: it had {state:,} bytes and has {size:,} now.",
                path=self._path.name,
                state=self._state[0],
                size=size,
            ),
            msg("Fetch the model again."),
        )

    def close(self) -> None:
        self._file.close()
