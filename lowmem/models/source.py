"""Resolving model references: which checkpoint a reference names, what it contains, and what is on this machine.

Reads configuration and headers only; `fetch.py` downloads the weights.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem.errors import BadInput, CorruptModel, GatedModel, LowMemError, ModelNotFound, Offline
from lowmem.messages import msg
from lowmem.models import catalog, demo, hub
from lowmem.models.describe import describe, describe_gguf
from lowmem.models.files import LocalFile, LocalFolder, digest, fingerprint, read_object
from lowmem.models.foreign import build_leniently
from lowmem.models.gguf_file import gguf_parts
from lowmem.models.model_files import CONFIG, model_files
from lowmem.models.reference import DEMO, Reference, parse_ref
from lowmem.models.spec import ModelSource, ModelSpec
from lowmem.settings import settings
from lowmem.units import format_bytes

__all__ = ["LocalModel", "Reference", "is_local", "local_folder", "local_models", "parse_ref", "read_spec"]

logger = logging.getLogger("lowmem.models")

RECORD = "source.json"
"""Written into every fetched or converted folder, see `Record`."""


@dataclass(frozen=True)
class Record:
    """Where a folder comes from: what `ModelSource` says of the model, and how the files are recognized.

    Args:
        origin: the address or file that it was fetched or converted from.
        revision, commit: as asked for, and what that was; of the hub.
        fingerprint: of the checkpoint on the hub or in the GGUF file.
        files: the fingerprint of the folder as it was written. While that still matches, the folder is that checkpoint.
    """

    ref: str = ""
    name: str = ""
    origin: str = ""
    revision: str = ""
    commit: str = ""
    licence: str = ""
    gated: bool = False
    fingerprint: str = ""
    files: str = ""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded without a network, under the reference `ref`."""

    ref: str
    name: str
    folder: Path
    size: int


def read_spec(ref: str, allow_paths: bool = True, encoders: bool = False) -> ModelSpec:
    """Resolve `ref` and describe the model from its configuration and headers; no weights are read or downloaded.

    When the hub cannot be reached, or the model is gated, a model of the catalog is described from there so that it
    can still be planned; fetching it raises the reason.

    Args:
        encoders: accept encoder models such as BERT too.

    Raises:
        BadInput, ModelNotFound, GatedModel, UnsafeModel, CorruptModel, Unsupported, Offline.
    """
    reference = parse_ref(ref, allow_paths)
    if folder := find_folder(reference):
        return _read_folder(folder, reference, encoders)
    if reference.kind == "gguf":
        source = ModelSource(reference.text, reference.name, fingerprint=gguf_fingerprint(reference))
        return describe_gguf(local_parts(reference.path), source)
    if reference.kind == "folder":
        raise _no_model(reference.path)
    if reference.kind == "demo":
        return _read_demo(reference)
    entry = catalog.find(reference.text)
    try:
        return _read_hub(reference, encoders)
    except (Offline, GatedModel) as error:
        if entry is None:
            raise with_local_models(error) if isinstance(error, Offline) else error from None
        logger.info("%s is described from the catalog: %s", reference.text, error)
        return entry.spec()


def local_folder(ref: str) -> Path | None:
    """The folder with config.json, safetensors and tokenizer; None when `ref` must be fetched first."""
    return find_folder(parse_ref(ref))


def is_local(ref: str) -> bool:
    """Can `ref` be loaded without a network?"""
    reference = parse_ref(ref)
    return (reference.kind == "gguf" and reference.path.is_file()) or find_folder(reference) is not None


def local_models(results: Path | None = None) -> list[LocalModel]:
    """Models in `settings().models` and in a folder of results, sorted by name.

    Args:
        results: `settings().outputs` by default.
    """
    roots = (settings().models, results or settings().outputs)
    found = [_local_model(folder) for root in roots for folder in _models_in(root)]
    return sorted(found, key=lambda model: model.name.lower())


def with_local_models(error: Offline) -> Offline:
    """The same error with a hint that lists what has been fetched; results belong to who made them."""
    names = [_local_model(folder).ref for folder in _models_in(settings().models)]
    offer = (
        msg("On this machine: {names}.", names=", ".join(names[:8]))
        if names
        else msg("No model is on this machine yet.")
    )
    return Offline(error.message, f"{error.hint} {offer}")


def record(folder: Path) -> Record:
    """The record of a folder, empty when there is none; what is damaged is left out, with a note in the log."""
    if not (folder / RECORD).is_file():
        return Record()
    try:
        fields = read_object(LocalFolder(folder), RECORD)
    except (LowMemError, OSError) as error:
        logger.warning("%s of %s is ignored: %s", RECORD, folder.name, error)
        return Record()
    found, wrong = build_leniently(Record, fields)
    if wrong:
        logger.warning("%s of %s: ignored is %s", RECORD, folder.name, ", ".join(wrong))
    return found


def resolve_folder(folder: Path, ref: str) -> ModelSource:
    """The checkpoint in `folder`, under the reference that led there.

    Raises:
        CorruptModel, ModelNotFound: files are missing.
    """
    files = LocalFolder(folder)
    return _as_recorded(replace(_source_in(folder, ref), fingerprint=fingerprint(files, model_files(files))))


def is_current(source: ModelSource) -> bool:
    """Would the reference of a resolved model lead to the same files now? Of a model on the hub nothing is asked."""
    try:
        reference = parse_ref(source.ref)
        if find_folder(reference) != source.folder:
            return False
        if source.folder is not None:
            return resolve_folder(source.folder, source.ref).fingerprint == source.fingerprint
        return reference.kind != "gguf" or gguf_fingerprint(reference) == source.fingerprint
    except (LowMemError, OSError):
        return False


def local_parts(path: Path) -> list[LocalFile]:
    """The files of a GGUF model on disk.

    Raises:
        ModelNotFound: a part is missing.
    """
    return [LocalFile(path.with_name(name)) for name in gguf_parts(path.name)]


def gguf_fingerprint(reference: Reference) -> str:
    """The fingerprint of a GGUF file, before and after its conversion."""
    return digest({"gguf": "".join(part.identity() for part in local_parts(reference.path))})


def folder_name(reference: Reference, commit: str = "") -> str:
    """The name below `settings().models` of the folder that `reference` is fetched or converted to."""
    if reference.kind == "demo":
        return DEMO
    if reference.kind == "gguf":
        return f"gguf--{reference.path.stem}@{gguf_fingerprint(reference)[:12]}"
    parts = [reference.repo, reference.file] if reference.file else [reference.repo]
    return f"{'--'.join(parts).replace('/', '--')}@{commit}"


def gguf_in(repository: hub.Repository, reference: Reference) -> str:
    """The GGUF file that `reference` names; raises `ModelNotFound`, which lists those that exist."""
    if reference.file not in repository.files:
        known = ", ".join(sorted(name for name in repository.names if name.endswith(".gguf"))[:6]) or "none"
        raise ModelNotFound(
            msg("{repo} has no file {file}.", repo=reference.repo, file=reference.file),
            msg("Its GGUF files: {known}.", known=known),
        )
    return reference.file


def find_folder(reference: Reference, commit: str = "") -> Path | None:
    """The finished folder of a reference, None when there is none on this machine.

    Args:
        commit: of a hub reference only this commit will do.
    """
    models = settings().models
    if reference.kind == "folder":
        return reference.path if (reference.path / CONFIG).is_file() else None
    if reference.kind == "demo" or (reference.kind == "gguf" and reference.path.is_file()):
        folder = models / folder_name(reference)
        return folder if (folder / CONFIG).is_file() else None
    if reference.kind == "gguf":
        return None
    fetched = [folder for folder in _models_in(models) if folder.name.startswith(folder_name(reference))]
    wanted = [folder for folder in fetched if _is_revision(folder, commit or reference.revision)]
    return max(wanted, key=lambda folder: folder.stat().st_mtime, default=None)


def _is_revision(folder: Path, revision: str) -> bool:
    commit = folder.name.rsplit("@", 1)[1]
    is_commit = len(revision) >= 7 and commit.startswith(revision)
    return is_commit or record(folder).revision == revision


def _models_in(root: Path) -> Iterator[Path]:
    """Finished model folders; unfinished ones have another name, see `fetch.py`."""
    if root.is_dir():
        for folder in root.iterdir():
            if not folder.name.startswith(".") and not folder.name.endswith(".part") and (folder / CONFIG).is_file():
                yield folder


def _local_model(folder: Path) -> LocalModel:
    source = record(folder)
    ref = source.ref if _leads_to(source.ref, folder) else str(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return LocalModel(ref, source.name or parse_ref(str(folder)).name, folder, size)


def _leads_to(ref: str, folder: Path) -> bool:
    """False when a newer commit has been fetched since, or the converted GGUF file is gone."""
    try:
        return find_folder(parse_ref(ref)) == folder
    except BadInput:
        return False


def _read_folder(folder: Path, reference: Reference, encoders: bool) -> ModelSpec:
    spec = describe(LocalFolder(folder), _source_in(folder, reference.text), encoders)
    return replace(spec, source=_as_recorded(spec.source))


def _as_recorded(source: ModelSource) -> ModelSource:
    """With the fingerprint that the files had where they were fetched from, unless the folder has changed since."""
    about = record(source.folder) if source.folder else Record()
    return replace(source, fingerprint=about.fingerprint) if about.files == source.fingerprint else source


def _source_in(folder: Path, ref: str) -> ModelSource:
    """What the record of a folder says, without a fingerprint."""
    about = record(folder)
    packaged = about.origin == demo.WHEEL
    return ModelSource(
        ref=ref,
        name=demo.NAME if packaged else about.name or Reference("folder", ref, path=folder).name,
        folder=folder,
        revision=about.commit,
        detail=demo.DETAIL if packaged else "",
        licence=about.licence,
        gated=about.gated,
    )


def _read_hub(reference: Reference, encoders: bool) -> ModelSpec:
    repository = hub.repository(reference.repo or demo.HUB_ID, reference.revision)
    return describe_hub(repository, reference, encoders)


def describe_hub(repository: hub.Repository, reference: Reference, encoders: bool = False) -> ModelSpec:
    """The model that `reference` names in a repository. Raises what `describe` and `describe_gguf` raise."""
    source = ModelSource(
        ref=reference.text,
        name=reference.name,
        revision=repository.commit,
        licence=repository.licence,
        gated=repository.gated,
    )
    if reference.kind != "hub_gguf":
        return describe(repository, source, encoders)
    name = gguf_in(repository, reference)
    source = replace(source, fingerprint=fingerprint(repository, gguf_parts(name)))
    return describe_gguf([repository.ranged(part) for part in gguf_parts(name)], source)


def _read_demo(reference: Reference) -> ModelSpec:
    """The demo of the hub, whose weights are the originals, else the one of the package index."""
    if hub.reachable():
        with contextlib.suppress(Offline, GatedModel, ModelNotFound):
            return _read_hub(reference, encoders=False)
    entry = catalog.find(DEMO)
    assert entry is not None
    return replace(entry.spec(), source=demo.PACKAGED)


def _no_model(path: Path) -> LowMemError:
    if not path.exists():
        return ModelNotFound(msg("There is no folder {path}.", path=path), msg("Check the path."))
    if not path.is_dir():
        size = format_bytes(path.stat().st_size)
        return ModelNotFound(
            msg("{path} ({size}) is neither a folder nor a .gguf file.", path=path.name, size=size),
            msg("Name the model's folder."),
        )
    if any(path.glob("*.safetensors")):
        return CorruptModel(msg("{path} has weights but no config.json.", path=path), msg("Fetch the model again."))
    return ModelNotFound(
        msg("{path} has no config.json.", path=path), msg("Name a folder that transformers could load.")
    )
