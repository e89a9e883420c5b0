"""Named endpoints of exporting, like those in `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.export.run import export_isolated, forecast, output_folder, race
from lowmem.fields import build
from lowmem.machine.baseline import runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.planning.graph_options import ExportOptions
from lowmem.ui.api.core import told, told_stream
from lowmem.ui.parts.bind import ENGINE, pump
from lowmem.ui.service.quantizing import Workshop

Json = dict[str, Any]


def add_export_endpoints(workshop: Workshop) -> None:
    """Add /export_forecast, /export and /race to the Blocks that is being built."""
    quick = _forecast(workshop)
    gr.api(told(quick), api_name=quick.__name__, concurrency_limit=None)
    for stream in (_export(workshop), _race(workshop)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)


def _chosen(format: str, precision: str, options: Json | None) -> ExportOptions:
    return build(ExportOptions, {"format": format, "precision": precision} | (options or {}))


def _forecast(workshop: Workshop) -> Callable[..., Json]:
    def export_forecast(
        model: str, format: str = "onnx", precision: str = "int8", options: dict | None = None, ram: str = ""
    ) -> dict:
        """What an export would make and cost, in bytes and seconds; writes nothing."""
        budget = workshop.engine.child_budget(MemoryBudget.parse(ram))
        spec = workshop.engine.exportable(model.strip())
        expected = forecast(spec, _chosen(format, precision, options), runtime_bytes(), budget.limit("ram"))
        return asdict(expected) | {"verdict": expected.verdict, "sentence": expected.sentence()}

    return export_forecast


def _export(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def export(
        model: str, format: str = "onnx", precision: str = "int8", options: dict | None = None, ram: str = ""
    ) -> Iterator[dict]:
        """Export a model as a graph that is proven against it; yields progress, last of all {"receipt": ...} whose details name the folder."""
        engine, chosen, token = workshop.engine, _chosen(format, precision, options), CancelToken()
        ref = model.strip()
        out = output_folder(engine.exportable(ref).name, chosen)
        budget = workshop.engine.child_budget(MemoryBudget.parse(ram))
        events = export_isolated(ref, out, asdict(chosen), budget=budget, allow_paths=not engine.public, cancel=token)
        for gathered in pump(events, token):
            for event in gathered:
                if isinstance(event, Receipt):
                    engine.note(event)
                    yield {"receipt": event.as_dict()}
                else:
                    yield asdict(event)

    return export


def _race(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def race_(folder: str, model: str = "demo", ram: str = "") -> Iterator[dict]:
        """Time an exported graph against PyTorch; yields progress, last of all {"prompts", "torch", "onnx"}."""
        token = CancelToken()
        workshop.engine.spec(model.strip())  # refuses models that whoever asks may not name
        events = race(
            model.strip(), workshop.result(folder), token, workshop.engine.child_budget(MemoryBudget.parse(ram))
        )
        for gathered in pump(events, token):
            for event in gathered:
                yield event if isinstance(event, dict) else asdict(event)

    race_.__name__ = "race"
    return race_
