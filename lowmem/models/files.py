"""Access to the files of a model, on disk (here) or on the hub (`hub.py`), through one interface."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lowmem.errors import CorruptModel, ModelNotFound, UnsafeModel, file_errors
from lowmem.messages import msg
from lowmem.models.foreign import AGAIN, build, parse_object

T = TypeVar("T")

MAX_TEXT = 64 * 2**20
"""Size limit in bytes of files that are read into memory as a whole, such as an index or a tokenizer."""

_SAMPLES, _SAMPLE_BYTES = 16, 4096


class Ranged(Protocol):
    """A file of known size that supports reading byte ranges."""

    name: str
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes from `offset`; raises `CorruptModel` when the file ends before."""
        ...


class Files(Protocol):
    """A folder of files; `owner` is its name in messages."""

    @property
    def owner(self) -> str: ...

    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        ...

    def ranged(self, name: str) -> Ranged: ...

    def identity(self, name: str) -> str:
        """A string that changes whenever the content of the file does."""
        ...


def fingerprint(files: Files, names: Iterable[str]) -> str:
    """A hex digest over the content of the files `names`. Reads no more of them than `Files.identity` does."""
    return digest({name: files.identity(name) for name in names})


def digest(identities: Mapping[str, str]) -> str:
    """The fingerprint of files with these identities."""
    return hashlib.sha256(json.dumps(sorted(identities.items())).encode()).hexdigest()


def _reading(name: str) -> AbstractContextManager[None]:
    return file_errors(msg("{file} cannot be read", file=name))


class LocalFile:
    """A `Ranged` file on disk, opened for each read: reading a header takes two or three."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        with _reading(path.name):
            try:
                self.size = path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise ModelNotFound(msg("There is no file {path}.", path=path), msg("Check the path.")) from None

    def read(self, offset: int, length: int) -> bytes:
        with _reading(self.name), self.path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if len(data) < length:
            raise ends_early(self, offset + length)
        return data

    def identity(self) -> str:
        """Size, time of the last change, and a hash of samples of the content.

        Hashing gigabytes of weights would take longer than loading them. The samples distinguish fine-tunes of one
        model whose files carry the same time, as files unpacked from some archives do; the time distinguishes files
        that differ only between the samples.
        """
        samples = hashlib.sha256()
        with _reading(self.name), self.path.open("rb") as file:
            for index in range(_SAMPLES):
                file.seek(index * max(_SAMPLE_BYTES, self.size // _SAMPLES))
                samples.update(file.read(_SAMPLE_BYTES))
        return f"{self.size}:{self.path.stat().st_mtime_ns}:{samples.hexdigest()}"


class LocalFolder:
    """`Files` of a folder on disk: those in it, and weights in folders within it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owner = folder.name
        with _reading(folder.name):
            try:
                found = (*folder.iterdir(), *folder.glob("*/*.safetensors"))
            except (FileNotFoundError, NotADirectoryError):
                raise ModelNotFound(
                    msg("There is no folder {folder}.", folder=folder), msg("Check the path.")
                ) from None
            self.names: Collection[str] = {path.relative_to(folder).as_posix() for path in found if path.is_file()}

    def read(self, name: str) -> bytes:
        path = self._path(name)
        if path.stat().st_size > MAX_TEXT:
            raise CorruptModel(
                msg(
                    "{name} of {owner} is larger than {max_text:,} bytes.",
                    name=name,
                    owner=self.owner,
                    max_text=MAX_TEXT,
                ),
                msg("Choose another model."),
            )
        with _reading(name):
            return path.read_bytes()

    def ranged(self, name: str) -> LocalFile:
        return LocalFile(self._path(name))

    def identity(self, name: str) -> str:
        return self.ranged(name).identity()

    def _path(self, name: str) -> Path:
        """Raises `UnsafeModel` for a link that leaves the folder: what it leads to may end up in a result that is shared.

        The links of Hugging Face's cache lead from `snapshots/<commit>` to `blobs`.
        """
        path, folder = self.folder / name, self.folder.resolve()
        inside = [folder]
        if folder.parent.name == "snapshots":
            inside.append(folder.parent.parent / "blobs")
        if not any(path.resolve().is_relative_to(allowed) for allowed in inside):
            raise UnsafeModel(
                msg("{name} of {owner} is a link to a file outside of the folder.", name=name, owner=self.owner),
                msg("Replace the link by the file itself."),
            )
        return path


def read_object(files: Files, name: str) -> dict[str, Any]:
    """Read a small file that contains a JSON object."""
    return parse_object(files.read(name), msg("{name} of {owner}", name=name, owner=files.owner))


def read_fields(files: Files, name: str, kind: type[T], hint: str = AGAIN) -> T:
    """Read a small file that contains a JSON object as the dataclass `kind`, see `foreign.build`."""
    return build(kind, read_object(files, name), msg("{name} of {owner}", name=name, owner=files.owner), hint)


def ends_early(file: Ranged, needed: int) -> CorruptModel:
    """The error for a file that is shorter than its header says."""
    return CorruptModel(
        msg(
            "{file} is truncated: it has {size:,} bytes, its header needs {needed:,}.",
            file=file.name,
            size=file.size,
            needed=needed,
        ),
        msg("Fetch the model again."),
    )
