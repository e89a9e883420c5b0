"""Where a model comes from: a reference read as a spec, and what is on this machine already.

Reads configuration and headers only; `fetch.py` brings the weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, CorruptModel, GatedModel, LowMemError, ModelNotFound, Offline
from lowmem.models import catalog, hub
from lowmem.models.describe import CONFIG, describe, describe_gguf
from lowmem.models.files import LocalFile, LocalFolder
from lowmem.models.reference import DEMO, Reference, parse_ref
from lowmem.models.spec import ModelSpec
from lowmem.settings import settings
from lowmem.units import format_bytes

__all__ = ["LocalModel", "Reference", "is_local", "local_folder", "local_models", "parse_ref", "read_spec"]

logger = logging.getLogger("lowmem.models")

RECORD = "source.json"
"""Written into every fetched or converted folder: where it came from."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model ready to be loaded without network; `ref` is what to ask for."""

    ref: str
    name: str
    folder: Path
    size: int


def read_spec(ref: str, allow_paths: bool = True, encoders: bool = False) -> ModelSpec:
    """The model behind `ref`, from its configuration and headers; no weight is read or fetched.

    A hub model that cannot be asked about (offline, or gated) is described from the catalog if it is there,
    so that planning goes on; fetching it raises the reason.

    Args:
        encoders: describe models that only read text too.

    Raises:
        BadInput, ModelNotFound, GatedModel, UnsafeModel, CorruptModel, Unsupported, Offline.
    """
    reference = parse_ref(ref, allow_paths)
    if folder := find_folder(reference):
        return _read_folder(folder, reference, encoders)
    if reference.kind == "gguf":
        return describe_gguf(LocalFile(reference.path), reference.text, reference.name)
    if reference.kind == "folder":
        raise _no_model(reference.path)
    entry = catalog.find(reference.text)
    if entry and reference.kind == "demo":
        return entry.spec()
    try:
        return _read_hub(reference, encoders)
    except (Offline, GatedModel) as error:
        if entry is None:
            raise with_local_models(error) if isinstance(error, Offline) else error from None
        logger.info("%s is described from the catalog: %s", reference.text, error)
        return entry.spec()


def local_folder(ref: str) -> Path | None:
    """The folder with config.json, safetensors and tokenizer, or None when `ref` must be fetched first."""
    return find_folder(parse_ref(ref))


def is_local(ref: str) -> bool:
    """Can `ref` be loaded without network?"""
    reference = parse_ref(ref)
    return (reference.kind == "gguf" and reference.path.is_file()) or find_folder(reference) is not None


def local_models() -> list[LocalModel]:
    """Models in `settings().models` and `settings().outputs`, sorted by name."""
    found = [_local_model(folder) for root in (settings().models, settings().outputs) for folder in _models_in(root)]
    return sorted(found, key=lambda model: model.name.lower())


def with_local_models(error: Offline) -> Offline:
    """The same error with a hint that says what can be used instead."""
    names = [model.ref for model in local_models()]
    offer = f"On this machine: {', '.join(names[:8])}." if names else "No model is on this machine yet."
    return Offline(error.message, f"{error.hint} {offer}")


def record(folder: Path) -> dict[str, Any]:
    """What `RECORD` says about a folder; empty when there is none."""
    try:
        data = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def folder_name(reference: Reference, commit: str = "") -> str:
    """The name under `settings().models` of what `reference` is fetched or converted to."""
    if reference.kind == "demo":
        return DEMO
    if reference.kind == "gguf":
        stat = reference.path.stat()
        identity = f"{reference.path}|{stat.st_size}|{stat.st_mtime_ns}"
        return f"gguf--{reference.path.stem}@{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    parts = [reference.repo, reference.file] if reference.file else [reference.repo]
    return f"{'--'.join(parts).replace('/', '--')}@{commit}"


def gguf_in(repository: hub.Repository, reference: Reference) -> str:
    """The GGUF file that `reference` names; `ModelNotFound` with those that are there."""
    if reference.file not in repository.files:
        known = ", ".join(sorted(name for name in repository.names if name.endswith(".gguf"))[:6]) or "none"
        raise ModelNotFound(f"{reference.repo} has no file {reference.file}.", f"Its GGUF files: {known}.")
    return reference.file


def find_folder(reference: Reference) -> Path | None:
    """The finished folder of a reference, None when there is none on this machine."""
    models = settings().models
    if reference.kind == "folder":
        return reference.path if (reference.path / CONFIG).is_file() else None
    if reference.kind == "demo" or (reference.kind == "gguf" and reference.path.is_file()):
        folder = models / folder_name(reference)
        return folder if (folder / CONFIG).is_file() else None
    if reference.kind == "gguf":
        return None
    fetched = [folder for folder in _models_in(models) if folder.name.startswith(folder_name(reference))]
    wanted = [folder for folder in fetched if _is_revision(folder, reference.revision)]
    return max(wanted, key=lambda folder: folder.stat().st_mtime, default=None)


def _is_revision(folder: Path, revision: str) -> bool:
    commit = folder.name.rsplit("@", 1)[1]
    is_commit = len(revision) >= 7 and commit.startswith(revision)
    return is_commit or record(folder).get("revision") == revision


def _models_in(root: Path) -> Iterator[Path]:
    """Finished model folders: those under work are named otherwise, see `fetch.py`."""
    if root.is_dir():
        for folder in root.iterdir():
            if not folder.name.startswith(".") and not folder.name.endswith(".part") and (folder / CONFIG).is_file():
                yield folder


def _local_model(folder: Path) -> LocalModel:
    source = record(folder)
    asked_for = str(source.get("ref") or "")
    ref = asked_for if _leads_to(asked_for, folder) else str(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return LocalModel(ref, str(source.get("name") or parse_ref(str(folder)).name), folder, size)


def _leads_to(ref: str, folder: Path) -> bool:
    """Not when a newer commit was fetched since, or the GGUF file that was converted is gone."""
    try:
        return find_folder(parse_ref(ref)) == folder
    except BadInput:
        return False


def _read_folder(folder: Path, reference: Reference, encoders: bool) -> ModelSpec:
    source = record(folder)
    name, licence = str(source.get("name") or reference.name), str(source.get("licence") or "")
    return describe(LocalFolder(folder), reference.text, name, licence, bool(source.get("gated")), encoders)


def _read_hub(reference: Reference, encoders: bool) -> ModelSpec:
    repository = hub.repository(reference.repo, reference.revision)
    about = (reference.text, reference.name, repository.licence, repository.gated)
    if reference.kind == "hub":
        return describe(repository, *about, encoders)
    return describe_gguf(repository.ranged(gguf_in(repository, reference)), *about)


def _no_model(path: Path) -> LowMemError:
    if not path.exists():
        return ModelNotFound(f"There is no folder {path}.", "Check the path.")
    if not path.is_dir():
        size = format_bytes(path.stat().st_size)
        return ModelNotFound(f"{path.name} ({size}) is neither a folder nor a .gguf file.", "Name the model's folder.")
    if any(path.glob("*.safetensors")):
        return CorruptModel(f"{path} has weights but no config.json.", "Fetch the model again.")
    return ModelNotFound(f"{path} has no config.json.", "Name a folder that transformers could load.")
