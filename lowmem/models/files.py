"""A folder of files, wherever it lies: on disk here, on the hub in `hub.py`.

What reads models asks for names, small files, and byte ranges, and never knows the difference.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from lowmem.errors import CorruptModel, ModelNotFound

MAX_TEXT = 64 * 2**20
"""Bytes of the largest file that is read whole into memory (an index or a tokenizer)."""


class Ranged(Protocol):
    """A file of known size that can be read in pieces."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `CorruptModel` where the file ends earlier."""
        ...


class Files(Protocol):
    """A flat folder of files; `owner` is what messages call it."""

    @property
    def owner(self) -> str: ...

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> bytes:
        """A small file, whole."""
        ...

    def ranged(self, name: str) -> Ranged: ...


class LocalFile:
    """A `Ranged` on disk. Opened per read: headers take two or three."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        try:
            self.size = path.stat().st_size
        except OSError:
            raise ModelNotFound(f"There is no file {path}.", "Check the path.") from None

    def read(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise ends_early(self, offset + length)
        return data


class LocalFolder:
    """`Files` of a folder on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = folder.name
        try:
            self.names: Collection[str] = {entry.name for entry in folder.iterdir() if entry.is_file()}
        except OSError:
            raise ModelNotFound(f"There is no folder {folder}.", "Check the path.") from None

    def read(self, name: str) -> bytes:
        path = self.folder / name
        if path.stat().st_size > MAX_TEXT:
            raise CorruptModel(f"{name} of {self.owner} is larger than {MAX_TEXT:,} bytes.", "Choose another model.")
        return path.read_bytes()

    def ranged(self, name: str) -> LocalFile:
        return LocalFile(self.folder / name)


def read_object(files: Files, name: str) -> dict[str, Any]:
    """A JSON object stored as a small file."""
    return parse_object(files.read(name), f"{name} of {files.owner}")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """`data` as a JSON object; `CorruptModel` naming `what` when it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CorruptModel(f"{what} is not a JSON object.", "Fetch the model again, or choose another.")
    return value


def ends_early(file: Ranged, needed: int) -> CorruptModel:
    """The error for a file that is shorter than its own header says."""
    return CorruptModel(
        f"{file.name} is truncated: it has {file.size:,} bytes, its header needs {needed:,}.", "Fetch the model again."
    )
