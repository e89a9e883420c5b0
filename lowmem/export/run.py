"""Export a model, or benchmark an exported graph against PyTorch, in this process or in a child process. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.events import CancelToken, Receipt, Step, until_receipt
from lowmem.export.request import ExportRequest
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.models.fetch import fetch
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import discard
from lowmem.settings import settings


def output_folder(name: str, options: ExportOptions) -> Path:
    """A new folder below `settings().outputs`, named after the model and its format."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    first = settings().outputs / f"{short}-{options.format}-{options.precision}"
    names = (first if number == 1 else first.with_name(f"{first.name}-{number}") for number in range(1, 1000))
    return next(folder for folder in names if not folder.exists())


def export_model(request: ExportRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """Fetch the model if necessary and export it in this process; the last event is the receipt.

    Raises:
        LowMemError: see `models.fetch.fetch`, `pipeline.export_folder` and `tensorrt.export_engine`.
    """
    folder = yield from fetch(request.model, cancel, request.allow_paths, encoders=True)
    if request.options.format == "tensorrt":
        from lowmem.export.tensorrt import export_engine

        yield from export_engine(folder, request, cancel)
    else:
        from lowmem.export.pipeline import export_folder

        yield from export_folder(folder, request, cancel)


def export_isolated(request: ExportRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """`export_model` in a child process, whose memory is released at its end; the receipt's `details["folder"]` is the result.

    Raises:
        LowMemError: see `export_model`.
    """
    request.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for event in run_isolated("export", request.as_dict(), cancel, request.budget):
            yield _receipt(event, request.out) if isinstance(event, Finished) else event
    finally:
        discard(request.out)  # Stop kills the child, which cannot clean up


def _receipt(end: Finished, out: Path) -> Receipt:
    receipt = end.receipt()
    return replace(receipt, details=receipt.details | {"folder": str(out)})


def job(**request: Any) -> Generator[Step, None, dict[str, Any]]:
    """The child of `export_isolated`: returns the receipt as a dict. Stop kills the process."""
    receipt = yield from until_receipt(export_model(ExportRequest.from_dict(request)))
    return receipt.as_dict()


def benchmark(
    model: str, folder: Path, cancel: CancelToken | None = None, budget: MemoryBudget = UNLIMITED
) -> Iterator[Step | dict[str, Any]]:
    """Time the graph in `folder` against `model` in PyTorch and fp32, in one child process.

    The last event is {"prompts": [tokens, ...], "torch": {"prefill_tps": [...], "token_ms": [...]}, "onnx": {...}}.
    """
    arguments = {"model": model, "folder": str(folder)}
    for event in run_isolated("benchmark_graph", arguments, cancel, budget):
        yield event.value if isinstance(event, Finished) else event
