"""Files of a hub repository brought into a folder: resumed, checked, stoppable.

A file under way is called NAME.part and survives a cut connection or a Stop; it gets its name
only once its bytes match the hub's hash.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lowmem.background import interruptible
from lowmem.errors import CorruptModel, DiskFull, Offline
from lowmem.events import CancelToken, Step
from lowmem.models import hub
from lowmem.models.hub import RemoteFile, Repository
from lowmem.units import format_bytes

ATTEMPTS = 5
"""Connections that may break in a row without bringing a byte."""

RETRY_SECONDS = 1.0
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quotas
_STEP_SECONDS = 0.1
_READ_BLOCK = 1 << 22


def download(repository: Repository, names: Iterable[str], folder: Path, cancel: CancelToken) -> Iterator[Step]:
    """Bring `names` into `folder`, which may hold parts of an earlier attempt.

    Raises:
        DiskFull: before the first byte when it cannot suffice, or when the disk fills up meanwhile.
        CorruptModel: bytes that do not match the hub's hash; they are deleted.
        Offline, GatedModel, Cancelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [repository.files[name] for name in names]
    total = sum(file.size for file in files)
    here = sum(_bytes_here(folder, file) for file in files)
    ensure_room(folder, total - here, repository.repo)
    done = 0
    for file in files:
        for position in _bring(repository, file, folder, cancel):
            yield Step(done + position, total, f"Fetching {file.name}", "B")
        done += file.size


def ensure_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to start writing `needed` bytes where they do not fit.

    Raises:
        DiskFull: naming both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        room = f"{format_bytes(free)} are free in {folder.parent}"
        raise _disk_full(f"{what} needs {format_bytes(needed)} of disk, {room}.")


def _disk_full(message: str) -> DiskFull:
    return DiskFull(message, "Delete something, or set LOWMEM_HOME to a larger disk.")


def _bytes_here(folder: Path, file: RemoteFile) -> int:
    paths = (folder / file.name, folder / f"{file.name}.part")
    return min(file.size, max(path.stat().st_size if path.exists() else 0 for path in paths))


def _bring(repository: Repository, file: RemoteFile, folder: Path, cancel: CancelToken) -> Iterator[int]:
    """Yields how many bytes of the file are there, now and then."""
    final, part = folder / file.name, folder / f"{file.name}.part"
    if final.exists():
        yield file.size
        return
    try:
        with part.open("ab+") as out:
            arrival = _Arrival(file, out)
            yield from arrival.take_stock(cancel)
            yield from _receive(repository, file, arrival, cancel)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = format_bytes(file.size)
        raise _disk_full(f"The disk is full: {file.name} needs {size} in {folder.parent}.") from error
    if not arrival.is_sound():
        part.unlink()
        raise CorruptModel(
            f"{file.name} of {repository.repo} does not have the hash that the hub states; it was deleted.",
            "Fetch it again.",
        )
    part.replace(final)
    yield file.size


def _receive(repository: Repository, file: RemoteFile, arrival: _Arrival, cancel: CancelToken) -> Iterator[int]:
    failures = 0
    while arrival.position < file.size:
        before, shown = arrival.position, 0.0
        try:
            for position, chunk in interruptible(hub.stream(repository, file.name, before), cancel):
                arrival.accept(position, chunk)
                if time.monotonic() - shown > _STEP_SECONDS:
                    shown = time.monotonic()
                    yield arrival.position
        except Offline as error:
            failures = 0 if arrival.position > before else failures + 1
            if failures >= ATTEMPTS:
                kept = f"{format_bytes(arrival.position)} of {format_bytes(file.size)} of {file.name} are kept"
                raise Offline(f"{error.message} {kept}.", "Fetch again to go on from there.") from error
            cancel.wait(RETRY_SECONDS)
            continue
        if arrival.position <= before:
            raise CorruptModel(f"The hub sends {file.name} without content.", "Try again later.")


class _Arrival:
    """The bytes of one file as they come in, hashed on the way."""

    def __init__(self, file: RemoteFile, out: BinaryIO) -> None:
        self._file, self._out = file, out
        self._restart()

    def _restart(self) -> None:
        self.position = 0
        self._kind, _, self._expected = self._file.digest.partition(":")
        # A git blob's id covers a header with its size, see git-hash-object.
        self._hash = hashlib.sha1(b"blob %d\0" % self._file.size) if self._kind == "git" else hashlib.sha256()

    def take_stock(self, cancel: CancelToken) -> Iterator[int]:
        """Hash what an earlier attempt left."""
        self._out.seek(0)
        while block := self._out.read(_READ_BLOCK):
            cancel.check()
            self._hash.update(block)
            self.position += len(block)
            yield self.position
        if self.position > self._file.size:
            self._drop()

    def accept(self, position: int, chunk: bytes) -> None:
        if position != self.position:  # the server does not resume and starts over
            self._drop()
        if self.position + len(chunk) > self._file.size:
            stated = f"the {self._file.size:,} bytes that it states"
            raise CorruptModel(f"The hub sends more of {self._file.name} than {stated}.", "Try again later.")
        self._out.write(chunk)
        self._hash.update(chunk)
        self.position += len(chunk)

    def _drop(self) -> None:
        self._out.truncate(0)
        self._restart()

    def is_sound(self) -> bool:
        matches = not self._expected or self._hash.hexdigest() == self._expected.lower()
        return matches and self.position == self._file.size
