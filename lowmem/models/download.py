"""Downloading files of a hub repository into a folder: resumable, verified, stoppable.

A file being downloaded is called NAME.part and survives a broken connection, Stop and a killed process; it is renamed
once its bytes match the hub's hash.

huggingface_hub's `hf_hub_download` and `snapshot_download` do less: since 2.x they write to a temporary file of
their own that is never resumed, so a child killed on Stop starts from the first byte again (measured: the kill takes
11 ms, and the next attempt downloads 100 % of the file); nor do they verify the hash.
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
from lowmem.messages import msg
from lowmem.models import hub
from lowmem.models.hub import RemoteFile, Repository
from lowmem.units import format_bytes

ATTEMPTS = 5
"""Consecutive connections that may fail without receiving a byte."""

RETRY_SECONDS = 1.0
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))  # Windows knows no quotas
_STEP_SECONDS = 0.1
_READ_BLOCK = 1 << 22


def download(repository: Repository, names: Iterable[str], folder: Path, cancel: CancelToken) -> Iterator[Step]:
    """Download `names` into `folder`, resuming what an earlier attempt left there.

    Raises:
        DiskFull: before the first byte when the disk is too small, or when it fills up during the download.
        CorruptModel: a file does not match the hub's hash; it is deleted.
        Offline, GatedModel, Cancelled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [repository.files[name] for name in names]
    total = sum(file.size for file in files)
    present = sum(_bytes_present(folder, file) for file in files)
    ensure_room(folder, total - present, repository.repo)
    done = 0
    for file in files:
        for position in _download_file(repository, file, folder, cancel):
            yield Step(done + position, total, msg("Fetching {file}", file=file.name), "B")
        done += file.size


def ensure_room(folder: Path, needed: int, what: str) -> None:
    """Raise `DiskFull` when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise _disk_full(
            msg(
                "{what} needs {needed} of disk space, but only {free} is free in {parent}.",
                what=what,
                needed=format_bytes(needed),
                free=format_bytes(free),
                parent=folder.parent,
            )
        )


def _disk_full(message: str) -> DiskFull:
    return DiskFull(message, msg("Free some space, or set LOWMEM_HOME to a folder on a larger disk."))


def _bytes_present(folder: Path, file: RemoteFile) -> int:
    paths = (folder / file.name, folder / f"{file.name}.part")
    return min(file.size, max(path.stat().st_size if path.exists() else 0 for path in paths))


def _download_file(repository: Repository, file: RemoteFile, folder: Path, cancel: CancelToken) -> Iterator[int]:
    """Yields the number of bytes present so far, several times a second."""
    final, part = folder / file.name, folder / f"{file.name}.part"
    if final.exists():
        yield file.size
        return
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab+") as out:
            partial = _PartialFile(file, out)
            yield from partial.hash_present(cancel)
            yield from _receive(repository, file, partial, cancel)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        size = format_bytes(file.size)
        raise _disk_full(
            msg("The disk is full: {file} needs {size} in {parent}.", file=file.name, size=size, parent=folder.parent)
        ) from error
    if not partial.is_complete():
        part.unlink()
        raise CorruptModel(
            msg(
                "{file} of {repo} does not match the hub's hash; it was deleted.", file=file.name, repo=repository.repo
            ),
            msg("Fetch it again."),
        )
    part.replace(final)
    yield file.size


def _receive(repository: Repository, file: RemoteFile, partial: _PartialFile, cancel: CancelToken) -> Iterator[int]:
    failures = 0
    while partial.position < file.size:
        before, shown = partial.position, 0.0
        try:
            for position, chunk in interruptible(hub.stream(repository, file.name, before), cancel):
                partial.accept(position, chunk)
                if time.monotonic() - shown > _STEP_SECONDS:
                    shown = time.monotonic()
                    yield partial.position
        except Offline as error:
            failures = 0 if partial.position > before else failures + 1
            if failures >= ATTEMPTS:
                received, size = format_bytes(partial.position), format_bytes(file.size)
                raise Offline(
                    msg(
                        "{message} {received} of {size} of {file} are saved.",
                        message=error.message,
                        received=received,
                        size=size,
                        file=file.name,
                    ),
                    msg("Fetch again to resume."),
                ) from error
            cancel.wait(RETRY_SECONDS)
            continue
        if partial.position <= before:
            raise CorruptModel(msg("The hub sent no content for {file}.", file=file.name), msg("Try again later."))


class _PartialFile:
    """A file being downloaded, hashed as its bytes arrive."""

    def __init__(self, file: RemoteFile, out: BinaryIO) -> None:
        self._file, self._out = file, out
        self._restart()

    def _restart(self) -> None:
        self.position = 0
        self._kind, _, self._expected = self._file.digest.partition(":")
        # The id of a git blob covers a header with its size, see git-hash-object.
        self._hash = hashlib.sha1(b"blob %d\0" % self._file.size) if self._kind == "git" else hashlib.sha256()

    def hash_present(self, cancel: CancelToken) -> Iterator[int]:
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
        if position != self.position:  # the server does not support Range and starts from the beginning
            self._drop()
        if self.position + len(chunk) > self._file.size:
            raise CorruptModel(
                msg(
                    "The hub sent more than the {size:,} bytes that it lists for {file}.",
                    size=self._file.size,
                    file=self._file.name,
                ),
                msg("Try again later."),
            )
        self._out.write(chunk)
        self._hash.update(chunk)
        self.position += len(chunk)

    def _drop(self) -> None:
        self._out.truncate(0)
        self._restart()

    def is_complete(self) -> bool:
        matches = not self._expected or self._hash.hexdigest() == self._expected.lower()
        return matches and self.position == self._file.size
