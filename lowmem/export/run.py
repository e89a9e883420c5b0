"""Export a model, or benchmark an exported graph against PyTorch, in this process or in a child process. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.errors import file_errors, memory_errors
from lowmem.events import CancelToken, Receipt, Step, until_receipt
from lowmem.export.request import ExportRequest, why_generic
from lowmem.machine import timing
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.timing import SMALLEST_TIMED, timed
from lowmem.messages import msg
from lowmem.models.fetch import fetch
from lowmem.models.inventory import unused
from lowmem.models.source import read_spec
from lowmem.planning.exported import export_work, writing_seconds
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import discard
from lowmem.settings import settings


def output_folder(name: str, options: ExportOptions, root: Path | None = None) -> Path:
    """A new folder below `root`, by default `settings().outputs`, named after the model and its format."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return unused((root or settings().outputs) / f"{short}-{options.format}-{options.precision}")


def export_model(request: ExportRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """Fetch the model if necessary and export it in this process; the last event is the receipt.

    Raises:
        LowMemError: see `models.fetch.fetch`, `pipeline.export_folder` and `tensorrt.export_engine`.
    """
    with memory_errors(msg("{out} was not finished", out=request.out.name)):
        seconds = yield from measured(request, cancel)
        yield from timed(_export(request, cancel), _work(request), seconds)


def measured(request: ExportRequest, cancel: CancelToken | None = None) -> Generator[Step, None, float | None]:
    """The estimated seconds, for which this machine is measured in a child process unless it was before.

    None for an encoder and a TensorRT engine, for a small model, and where measuring fails.
    """
    spec = read_spec(request.model, request.allow_paths, encoders=True)
    options = request.options
    if spec.parameters < SMALLEST_TIMED or options.format != "onnx" or spec.encoder or spec.exported:
        return None

    def estimate() -> float:
        return writing_seconds(spec, options, bool(why_generic(spec, options)))

    return (yield from timing.measured(estimate, "measure_export", request.as_dict(), cancel, request.budget))


def measure(**request: Any) -> Generator[Step, None, None]:
    """The job that measures the rates which the estimate of a request needs."""
    from lowmem.export.probes import measure_export

    yield Step(0, 0, msg("Measuring how fast this machine is"))
    asked = ExportRequest.from_dict(request)
    spec = read_spec(asked.model, asked.allow_paths)
    measure_export(spec, asked.options, bool(why_generic(spec, asked.options)))


def _work(request: ExportRequest) -> str:
    spec = read_spec(request.model, request.allow_paths, encoders=True)
    return export_work(spec, request.options, bool(why_generic(spec, request.options)))


def _export(request: ExportRequest, cancel: CancelToken | None) -> Iterator[Step | Receipt]:
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
    with file_errors(msg("{out} was not begun", out=request.out.name)):
        request.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = yield from measured(request, cancel)
    ran = run_isolated("export", request.as_dict(), cancel, request.budget)
    events = (_receipt(event, request.out) if isinstance(event, Finished) else event for event in ran)
    try:
        yield from timed(events, _work(request), seconds)
    finally:
        discard(request.out)  # Stop kills the child, which cannot clean up


def _receipt(end: Finished, out: Path) -> Receipt:
    receipt = end.receipt()
    return replace(receipt, details=receipt.details | {"folder": str(out)})


def job(**request: Any) -> Generator[Step, None, dict[str, Any]]:
    """The child of `export_isolated`: returns the receipt as a dict. Stop kills the process."""
    receipt = yield from until_receipt(_export(ExportRequest.from_dict(request), None))
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
