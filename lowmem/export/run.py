"""Exporting, and racing a graph against PyTorch, each in a process of its own. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.models.config import is_encoder
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import discard
from lowmem.settings import settings
from lowmem.units import format_bytes

RACE_PROMPTS, RACE_NEW, RACE_RUNS = (32, 128, 512), 24, 3
"""Prompt tokens, new tokens and runs of a race; medians count."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What an export would make and cost.

    Args:
        disk_bytes, ram_bytes: of the folder, and the peak of the process that writes it.
        seconds: a guess, to a figure.
        session_bytes: what running it holds of weights.
        limit: bytes that the process may hold.
        generic: why there is no fused graph, "" when there is one.
        caution: what the precision costs, "" where that is little.
    """

    disk_bytes: int
    ram_bytes: int
    seconds: float
    session_bytes: int
    limit: int
    generic: str = ""
    caution: str = ""

    @property
    def verdict(self) -> str:
        if self.ram_bytes > self.limit:
            return "over"
        return "tight" if self.ram_bytes > 0.9 * self.limit else "fits"

    def sentence(self) -> str:
        if self.verdict == "over":
            return f"Needs {format_bytes(self.ram_bytes)} of RAM, the budget leaves {format_bytes(self.limit)}."
        kind = (
            f"A generic graph. {self.generic}" if self.generic else "A fused graph: attention, cache and norms in one."
        )
        return f"Fits the budget of {format_bytes(self.limit)}. {kind}"


def forecast(spec: ModelSpec, options: ExportOptions, runtime_bytes: int, limit: int) -> Forecast:
    """Predicted from the shape alone.

    Raises:
        BadInput: an export of an export.
    """
    if spec.exported:
        raise BadInput(f"{spec.name} is an exported graph already.", "Choose the model it came from.")
    generic = (
        "It is an encoder."
        if is_encoder(spec.model_type)
        else exported.refusal(spec) or ("" if options.fused else "Standard operators were asked for.")
    )
    seconds = exported.writing_seconds(spec, options.precision)
    caution = exported.caution(spec, options.precision, fused=not generic)
    if generic:
        size = exported.generic_bytes(spec, options.precision, options.group_size)
        peak = exported.tracing_bytes(spec, options.precision, options.group_size, options.optimise)
        return Forecast(size, runtime_bytes + peak, 3 * seconds, size, limit, generic, caution)
    size = exported.disk_bytes(spec, options.precision, options.group_size, options.has_prefill)
    peak = exported.writing_bytes(spec, options.precision, options.group_size, options.has_prefill)
    return Forecast(size, runtime_bytes + peak, seconds, size, limit, caution=caution)


def output_folder(name: str, options: ExportOptions) -> Path:
    """Where the page puts a result: below `settings().outputs`, named after what it is, and not there yet."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    first = settings().outputs / f"{short}-{options.format}-{options.precision}"
    names = (first if number == 1 else first.with_name(f"{first.name}-{number}") for number in range(1, 1000))
    return next(folder for folder in names if not folder.exists())


def export_isolated(
    ref: str,
    out: Path,
    options: Mapping[str, Any],
    *,
    budget: MemoryBudget = UNLIMITED,
    allow_paths: bool = True,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """Export `ref` into the new folder `out`; the receipt comes last, `details["folder"]` says where it is.

    Raises:
        LowMemError: see `pipeline.export_model` and `models.fetch.fetch`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = {
        "ref": ref,
        "out": str(out),
        "options": dict(options),
        "budget": budget.as_dict(),
        "allow_paths": allow_paths,
    }
    try:
        for event in run_isolated("export", arguments, cancel, budget):
            yield _receipt(event, out) if isinstance(event, Finished) else event
    finally:
        discard(out)  # Stop is a kill, which leaves the child no time to


def _receipt(end: Finished, out: Path) -> Receipt:
    given = {field.name: end.value[field.name] for field in fields(Receipt)}
    receipt = Receipt(**given | {"notes": tuple(given["notes"])})
    measured = {key: end.peak_bytes[key] for key in receipt.predicted if key in end.peak_bytes}
    return replace(receipt, measured=measured, details=receipt.details | {"folder": str(out)})


def job(
    ref: str, out: str, options: Mapping[str, Any], budget: Mapping[str, int], allow_paths: bool = True
) -> Generator[Step, None, dict[str, Any]]:
    """The child's part: fetch `ref` where it must be, export it, return the receipt as a dict."""
    for event in export(ref, Path(out), ExportOptions(**options), MemoryBudget(**budget), allow_paths):
        if isinstance(event, Receipt):
            return event.as_dict()
        yield event
    raise RuntimeError("an action ended without a receipt")


def graph_job(
    folder: str, out: str, options: dict[str, Any], ref: str, budget: Mapping[str, int]
) -> Generator[Step, None, dict[str, object]]:
    """The child's part of a graph that the runtime wants: `folder` is there already; returns the receipt as a dict."""
    from lowmem.export.pipeline import export_model

    events = export_model(Path(folder), Path(out), ExportOptions(**options), ref=ref, budget=MemoryBudget(**budget))
    for event in events:
        if isinstance(event, Receipt):
            return event.as_dict()
        yield event
    raise RuntimeError("an export ended without a receipt")


def race(
    ref: str, folder: Path, cancel: CancelToken | None = None, budget: MemoryBudget = UNLIMITED
) -> Iterator[Step | dict[str, Any]]:
    """Time the graph in `folder` against PyTorch in fp32, the model `ref`, in turns.

    The last event is {"prompts": [tokens, ...], "torch": {"prefill_tps": [...], "token_ms": [...]}, "onnx": {...}}.
    """
    arguments = {"ref": ref, "folder": str(folder)}
    for event in run_isolated("benchmark_graph", arguments, cancel, budget):
        yield event.value if isinstance(event, Finished) else event


def export(
    ref: str, out: Path, options: ExportOptions, budget: MemoryBudget = UNLIMITED, allow_paths: bool = True
) -> Iterator[Step | Receipt]:
    """Fetch `ref` if need be and export it; the last event is the receipt."""
    from lowmem.models.fetch import fetch

    folder = yield from fetch(ref, None, allow_paths, encoders=True)
    if options.format == "tensorrt":
        from lowmem.export.tensorrt import export_engine

        yield from export_engine(folder, out, options, ref=ref, budget=budget)
        return
    from lowmem.export.pipeline import export_model

    yield from export_model(folder, out, options, ref=ref, budget=budget)
