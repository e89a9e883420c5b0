"""Reading weight files past the page cache.

Deals with files, offsets and alignment, not with tensors. A read goes straight into the caller's buffer (O_DIRECT); on
file systems without that, pages are dropped from the cache as soon as they are read.
"""

from __future__ import annotations

import logging
import mmap
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem.errors import CorruptModel, LowMemError, ModelNotFound, is_out_of_memory
from lowmem.messages import msg

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("lowmem.offload")

PAGE = 4096
"""Direct reads start and end on multiples of this."""

CHUNK_BYTES = 4 << 20
"""Bytes per read: large enough for full bandwidth, small enough to balance threads at the end of a block."""


class Shard:
    """One weight file, open as long as its model is loaded. Thread-safe.

    Raises:
        ModelNotFound: the file is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._file, self.direct = _open(path)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise ModelNotFound(
                msg("{path} cannot be opened: {strerror}.", path=path.name, strerror=error.strerror),
                msg("Reconnect its disk, or fetch the model again."),
            ) from error
        self._identity = _identity(os.fstat(self._file))

    def check(self) -> None:
        """Verify that this is still the file that was opened.

        Raises:
            CorruptModel: it was replaced, truncated or written to.
            ModelNotFound: it is gone.
        """
        try:
            there, held = self.path.stat(), os.fstat(self._file)
        except OSError as error:
            raise self._gone(error) from error
        if _identity(there) == _identity(held) == self._identity:
            return
        if there.st_ino != self._identity[1] or there.st_dev != self._identity[0]:
            raise CorruptModel(
                msg("{path} was replaced while the model ran.", path=self.path.name), msg("Load the model again.")
            )
        raise CorruptModel(
            msg(
                "{path} changed while the model ran: it had {identity:,} bytes and has {st_size:,} now.",
                path=self.path.name,
                identity=self._identity[2],
                st_size=there.st_size,
            ),
            msg("Fetch the model again, then load it."),
        )

    def read(self, offset: int, memory: memoryview, needed: int) -> None:
        """Fill `memory` from `offset`, both multiples of a page; the last `len(memory) - needed` bytes may be past the end.

        Raises:
            CorruptModel, ModelNotFound: see `check`; also when the disk fails.
        """
        done = 0
        try:
            while done < needed:
                count = _read_some(self._file, memory[done:], offset + done)
                if not count:
                    self.check()
                    raise CorruptModel(
                        msg("{path} ends within a weight.", path=self.path.name), msg("Fetch the model again.")
                    )
                done += count
        except OSError as error:
            raise self._failed(error) from error
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def map(self) -> mmap.mmap:
        """The file mapped into memory, read-only: a cap counts private writable memory in full, whatever is touched."""
        return mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            if not self._closed:
                os.close(self._file)
            self._closed = True

    def _failed(self, error: OSError) -> Exception:
        if is_out_of_memory(error):
            return error
        try:
            self.check()
        except LowMemError as known:
            return known
        return CorruptModel(
            msg("{path} cannot be read: {strerror}.", path=self.path.name, strerror=error.strerror),
            msg("Check the disk; then load the model again."),
        )

    def _gone(self, error: OSError) -> ModelNotFound:
        return ModelNotFound(
            msg("{path} no longer exists: {strerror}.", path=self.path.name, strerror=error.strerror),
            msg("Reconnect its disk, or fetch the model again."),
        )


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY | flag)
            # Some file systems accept the flag and reject the reads.
            try:
                with mmap.mmap(-1, PAGE) as page:
                    _read_some(file, memoryview(page), 0)
                return file, True
            except OSError:
                os.close(file)
    log.info("%s is read through the page cache", path.name)
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), False


_seek = threading.Lock()


def _read_some(file: int, memory: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [memory], offset)
    with _seek:  # Windows has no positioned read
        os.lseek(file, offset, os.SEEK_SET)
        content = os.read(file, len(memory))
    memory[: len(content)] = content
    return len(content)


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    if not stat.S_ISREG(found.st_mode):
        return (found.st_dev, found.st_ino, -1, 0)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def page_aligned(nbytes: int, pinned: bool = False) -> Tensor:
    """A uint8 buffer that starts on a page."""
    import torch  # files are read without it, too

    raw = torch.empty(nbytes + PAGE, dtype=torch.uint8, pin_memory=pinned)
    skip = -raw.data_ptr() % PAGE
    return raw[skip : skip + nbytes]
