"""Activations of the calibration text in a file, one sample at a time in memory.

The operating system caches the file's pages while there is room and evicts them when there is not, so the same code
serves every budget; and a file outlives the process, so that a killed run can continue.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.checkpoint import as_bytes


class Activations:
    """fp32 [samples, tokens, width] in the file `path`; `checksum` is the CRC-32 of the samples written in order so far."""

    def __init__(self, path: Path, samples: int, tokens: int, width: int) -> None:
        """Open `path`; created, or extended with zeros to its size, if necessary."""
        self.path, self.samples, self.tokens, self.width = path, samples, tokens, width
        self.checksum = 0
        self._sample_bytes = 4 * tokens * width
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)), "r+b", buffering=0)
        self._file.truncate(samples * self._sample_bytes)

    def write(self, index: int, values: Tensor) -> None:
        """Store `values` [1, tokens, width] or [tokens, width] as sample `index`."""
        memory = as_bytes(values.detach().to("cpu", torch.float32).contiguous())
        self.checksum = zlib.crc32(memory, self.checksum)
        self._file.seek(index * self._sample_bytes)
        done = 0
        while done < len(memory):
            done += self._file.write(memory[done:]) or 0

    def read(self, index: int, device: torch.device | None = None) -> Tensor:
        """Sample `index`, fp32 [1, tokens, width]."""
        values = torch.empty(1, self.tokens, self.width)
        memory, done = as_bytes(values), 0
        self._file.seek(index * self._sample_bytes)
        while done < len(memory):
            count = self._file.readinto(memory[done:])
            if not count:
                raise CorruptModel(
                    msg("{path} ends before sample {index}.", path=self.path.name, index=index + 1),
                    msg("Start again in a new folder."),
                )
            done += count
        return values if device is None else values.to(device)

    def read_checksum(self) -> int:
        """The CRC-32 of the whole file, read again."""
        checksum = 0
        for index in range(self.samples):
            checksum = zlib.crc32(as_bytes(self.read(index)), checksum)
        return checksum

    def close(self, *, delete: bool = False) -> None:
        """Close the file; idempotent."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
