"""The anatomy of a model, from where it is known: derived before, or derived now.

Deriving takes torch, and 170 MB of what torch computes without data with: a child process of a few seconds does it, so
that no process that plans, and none that runs a model in a budget, holds them. The child has limits of time and memory:
what it builds is what a stranger's config.json says. What it found is kept below `settings().home`, by the content of
what it was derived from.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from lowmem.errors import CorruptModel, LowMemError, Unsupported
from lowmem.messages import msg
from lowmem.models.anatomy import Anatomy
from lowmem.models.sizes import check_sizes
from lowmem.models.tensors import Tensor
from lowmem.settings import child_environment, settings

log = logging.getLogger("lowmem.models")

TIMEOUT_SECONDS = 120
"""For a derivation, which takes some seconds on a quiet machine."""

IN_PROCESS = False
"""Derive without a child process. Tests do, since it is faster."""


def derive(
    config: Mapping[str, Any],
    name: str,
    stored: Iterable[Tensor] | None,
    dtype: str = "",
    held: Sequence[Tensor] | None = None,
) -> Anatomy:
    """The anatomy of the model that a config.json and the tensors of its files describe.

    Args:
        name: of the model, for messages.
        stored: the tensors of its files; None for every parameter, stored in `dtype`.
        held: what the files hold under names of their own, where `stored` is None; None if there are no files.

    Raises:
        UnsafeModel, Unsupported, CorruptModel: see `meta_model.anatomy` and `sizes.check_sizes`.
    """
    tensors = None if stored is None else tuple(stored)
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise CorruptModel(
            msg("config.json of {name} has no model_type.", name=name), msg("Check that this is a transformers model.")
        )
    check_sizes(config, name, held if tensors is None else tensors)
    key = key_of(config, tensors, dtype)
    if (found := _derived_here.get(key) or _shipped().get(key) or _kept(key)) is None:
        found = _derived(config, name, tensors, dtype)
        _keep(key, found)
    _derived_here[key] = found
    return found


def key_of(config: Mapping[str, Any], stored: tuple[Tensor, ...] | None, dtype: str) -> str:
    """What identifies the input of a derivation."""
    tensors = stored and [astuple(tensor) for tensor in stored]
    content = json.dumps([FORMAT, config, tensors, dtype], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


FORMAT = 2
"""Of anatomies as JSON; a new number makes those that were kept be derived anew."""

SHIPPED = Path(__file__).with_name("anatomies.json")
"""Anatomies of the catalog's models, written by `python -m lowmem.models.anatomies`."""

_derived_here: dict[str, Anatomy] = {}


@functools.cache
def _shipped() -> dict[str, Anatomy]:
    try:
        found = json.loads(SHIPPED.read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {key: Anatomy.from_json(one) for key, one in found.items()}


def _path(key: str) -> Path:
    release = importlib.metadata.version("transformers")
    return settings().home / "anatomy" / f"{key}-{release}.json"


def _kept(key: str) -> Anatomy | None:
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return Anatomy.from_json(json.loads(_path(key).read_text(encoding="utf-8")))
    return None


def _keep(key: str, found: Anatomy) -> None:
    path = _path(key)
    part = path.with_suffix(f".{os.getpid()}.part")  # two processes may derive the same model
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(found.to_json()), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _derived(config: Mapping[str, Any], name: str, stored: tuple[Tensor, ...] | None, dtype: str) -> Anatomy:
    if IN_PROCESS:
        from lowmem.models.meta_model import anatomy

        return anatomy(config, name, stored, dtype)
    command = [sys.executable, "-m", "lowmem.models.meta_model"]
    description = pickle.dumps((dict(config), name, stored, dtype))
    try:
        done = subprocess.run(
            command,
            input=description,
            capture_output=True,
            timeout=TIMEOUT_SECONDS,
            check=True,
            env=child_environment(),
        )
        result = pickle.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, pickle.UnpicklingError, EOFError) as error:
        log.error("examining %s: %s", name, getattr(error, "stderr", error))
        reason = (
            msg("it takes longer than {seconds} s", seconds=TIMEOUT_SECONDS)
            if isinstance(error, subprocess.TimeoutExpired)
            else msg("the process ended without a result")
        )
        raise Unsupported(
            msg("The inside of {name} could not be examined: {error}", name=name, error=reason),
            msg("Choose another model."),
        ) from error
    if isinstance(result, LowMemError):
        raise result
    assert isinstance(result, Anatomy)
    return result
