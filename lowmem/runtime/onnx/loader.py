"""Loading the exported graph of a plan from the cache, which is filled first when necessary.

Graphs are cached under LOWMEM_HOME, keyed by the fingerprint of the model and the export options, so each is written
once. Writing runs in a child process, which returns its memory to the system when it exits.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path

import torch

from lowmem.background import locked
from lowmem.errors import LowMemError
from lowmem.events import CancelToken, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.messages import msg
from lowmem.models.inventory import graph_prefix
from lowmem.planning.exported import runtime_version
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.plan import Plan
from lowmem.runtime.loader import Loaded, _tokenizer
from lowmem.runtime.onnx.manifest import discard, is_exported, read_manifest
from lowmem.runtime.onnx.model import OnnxModel
from lowmem.settings import settings
from lowmem.version import __version__

log = logging.getLogger("lowmem.export")


def load_graph(folder: Path) -> Generator[Step, None, Loaded]:
    """Open the exported `folder`; the generator's return value is a `Loaded` whose model is an `OnnxModel`.

    Raises:
        CorruptModel, Unsupported, BadInput, MissingDependency: see `OnnxModel`.
    """
    read_manifest(folder)
    tokenizer = _tokenizer(folder)
    yield Step(0, 0, msg("Opening the graph"))
    model = OnnxModel(folder)
    yield Step(1, 1, msg("Loading weights"))
    return Loaded(model, tokenizer, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]  # its duck


def graph_folder(
    plan: Plan, folder: Path, cancel: CancelToken, budget: MemoryBudget = UNLIMITED
) -> Generator[Step, None, Path]:
    """The exported model for `plan`: `folder` itself where it is one, else one in the cache, written when it is not there.

    Args:
        budget: for this process and the one that writes the graph together.

    Raises:
        Unsupported: there is no graph for the model, or it fails the parity check.
        DoesNotFit, DiskFull, OutOfMemory, Cancelled: while writing it.
    """
    if is_exported(folder):
        return folder
    options = _options(plan)
    graph = settings().home / "graphs" / f"{graph_prefix(plan.spec.source)}{_key(options)}"
    with locked(graph, cancel, msg("Waiting for another process that writes the same graph")) as waiting:
        yield from waiting
        if not _is_whole(graph):
            yield from _write(folder, graph, options, plan.spec.ref, cancel, budget.for_child_process())
    return graph


def _is_whole(graph: Path) -> bool:
    """Is the graph there? A damaged one is deleted."""
    if not graph.exists():
        return False
    try:
        read_manifest(graph)
    except LowMemError as error:
        log.warning("%s is written anew: %s", graph.name, error)
        shutil.rmtree(graph)
        return False
    return True


def _write(
    folder: Path, graph: Path, options: ExportOptions, ref: str, cancel: CancelToken, budget: MemoryBudget
) -> Generator[Step, None, None]:
    arguments = {
        "model": str(folder),
        "source": ref,
        "out": str(graph),
        "options": asdict(options),
        "budget": budget.as_dict(),
    }
    yield Step(0, 0, msg("Writing its graph, once"))
    try:
        for event in run_isolated("export", arguments, cancel, budget):
            if not isinstance(event, Finished):
                yield event
    finally:
        discard(graph)  # Stop kills the child, which cannot clean up


def _options(plan: Plan) -> ExportOptions:
    stored = plan.spec.stored
    if plan.precision == "stored" and stored is not None:
        return ExportOptions(precision="int4" if stored.bits <= 4 else "int8")
    return ExportOptions(precision=plan.precision)


def _key(options: ExportOptions) -> str:
    content = {"options": asdict(options), "versions": [__version__, runtime_version().split(".")[:2]]}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
