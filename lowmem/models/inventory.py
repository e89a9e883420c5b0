"""Listing, naming and deleting what lowmem stores on disk: models, outputs, graphs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import BadInput, LowMemError
from lowmem.messages import msg
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.model_files import MANIFEST
from lowmem.models.source import record
from lowmem.models.spec import ModelSource
from lowmem.settings import settings

KINDS = {"models": "fetched", "outputs": "made here", "graphs": "graph"}
"""Folder of LOWMEM_HOME -> label of what it contains."""


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """A stored folder.

    Args:
        key: path below LOWMEM_HOME, such as "models/demo"; see `find`.
        name: display name.
        kind: a label of `KINDS`.
    """

    key: str
    name: str
    kind: str
    nbytes: int

    @property
    def folder(self) -> Path:
        return settings().home / self.key


def stored_folders() -> list[StoredFolder]:
    """All finished folders, largest first."""
    found = [_folder(root, folder) for root in KINDS for folder in _folders(settings().home / root)]
    return sorted(found, key=lambda one: (-one.nbytes, one.key))


def find(key: str) -> StoredFolder:
    """
    Raises:
        BadInput: `key` is not that of a stored folder; paths to other folders are never accepted.
    """
    known = {one.key: one for one in stored_folders()}
    if key not in known:
        raise BadInput(msg("Nothing is stored here as {key!r}.", key=key[:80]), msg("Choose one from the list."))
    return known[key]


def delete(doomed: StoredFolder) -> None:
    """Delete a stored folder. It disappears from the list atomically.

    Raises:
        BadInput: the file system refuses.
    """
    away = doomed.folder.with_name(f".{doomed.folder.name}.deleted")
    try:
        shutil.rmtree(away, ignore_errors=True)  # left by an interrupted deletion
        doomed.folder.rename(away)
        shutil.rmtree(away)
    except OSError as error:
        raise BadInput(
            msg("{doomed} cannot be deleted: {strerror}.", doomed=doomed.name, strerror=error.strerror),
            msg("Close the program that uses it, then try again."),
        ) from error


def graph_prefix(source: ModelSource) -> str:
    """What the names of the folders of a model's graphs begin with."""
    return f"{source.fingerprint[:16]}-"


def _folders(root: Path) -> Iterator[Path]:
    for folder in root.iterdir() if root.is_dir() else ():
        finished = not folder.name.startswith(".") and not folder.name.endswith(".part")
        if finished and folder.is_dir() and not folder.is_symlink():
            yield folder


def _folder(root: str, folder: Path) -> StoredFolder:
    size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
    name = (record(folder).name or folder.name) if root == "models" else folder.name
    if root == "graphs" and (folder / MANIFEST).is_file():
        with contextlib.suppress(LowMemError):
            name = str(read_object(LocalFolder(folder), MANIFEST).get("model") or name)
    return StoredFolder(f"{root}/{folder.name}", name, KINDS[root], size)


def unused(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that does not exist."""
    names = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in range(1, 1000))
    return next(name for name in names if not name.exists())
