"""Named endpoints of quantizing and comparing, like those in `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lowmem.datasets.texts import MANUAL
from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.measure.options import MeasureOptions
from lowmem.quant import DEFAULT
from lowmem.sweep.grid import make_grid
from lowmem.ui.api.core import told, told_stream
from lowmem.ui.parts.bind import ENGINE, pump
from lowmem.ui.service.quantizing import Workshop

Json = dict[str, Any]


def add_workshop_endpoints(workshop: Workshop) -> None:
    """Add /forecast, /quantize, /compare, /sweep, /look and /push to the Blocks that is being built."""
    forecast = _forecast(workshop)
    gr.api(told(forecast), api_name=forecast.__name__, concurrency_limit=None)
    push = _push(workshop)
    gr.api(told(push), api_name=push.__name__, concurrency_limit=1)
    for stream in (_quantize(workshop), _compare(workshop), _sweep(workshop), _look(workshop)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)


def _quantize(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def quantize(
        model: str,
        method: str = DEFAULT,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        calibration: str = MANUAL,
        samples: int = 64,
        sequence_length: int = 512,
        options: dict | None = None,
        ram: str = "",
    ) -> Iterator[dict]:
        """Quantize a model; yields progress, last of all {"receipt": ...} whose details name the folder."""
        text = {"text": calibration, "samples": samples, "length": sequence_length}
        main = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        request = workshop.request(model.strip(), method, main | (options or {}), text, MemoryBudget.parse(ram))
        token = CancelToken()
        yield from _as_json(workshop.quantize(request, token), token)

    return quantize


def _forecast(workshop: Workshop) -> Callable[..., Json]:
    def forecast(
        model: str,
        method: str = DEFAULT,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = False,
        samples: int = 64,
        sequence_length: int = 512,
        options: dict | None = None,
        ram: str = "",
    ) -> dict:
        """What a quantization would make and cost, in bytes and seconds; reads no weight."""
        text = {"samples": samples, "length": sequence_length}
        main = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        request = workshop.request(model.strip(), method, main | (options or {}), text, MemoryBudget.parse(ram))
        expected = workshop.estimate(request)
        figures = asdict(expected)
        return figures | {"estimate": figures, "verdict": expected.verdict, "sentence": expected.sentence()}

    return forecast


def _compare(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def compare(
        model: str, variants: list, text: str = MANUAL, options: dict | None = None, ram: str = ""
    ) -> Iterator[dict]:
        """Measure variants such as "fp32", "int8", "gptq:4:64"; yields steps and rows, last of all the receipt."""
        token = CancelToken()
        chosen = build(MeasureOptions, options or {})
        events = workshop.compare(
            model.strip(), [str(v) for v in variants], text, chosen, token, MemoryBudget.parse(ram)
        )
        yield from _as_json(events, token)

    return compare


def _sweep(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def sweep(
        models: list,
        precisions: list | None = None,
        methods: dict | None = None,
        text: str = MANUAL,
        options: dict | None = None,
        workers: int = 0,
        ram: str = "",
    ) -> Iterator[dict]:
        """Measure models x (precisions, methods x settings), as many side by side as fit; yields steps and rows, last of all the receipt, whose details hold the table."""
        content = {"models": models, "precisions": precisions or [], "methods": methods or {}}
        grid = make_grid(content | {"text": text, "measure": options or {}, "reference": workshop.reference()})
        token = CancelToken()
        yield from _as_json(workshop.sweep(grid, token, MemoryBudget.parse(ram), int(workers)), token)

    return sweep


def _look(workshop: Workshop) -> Callable[..., Iterator[Json]]:
    def look(model: str = "demo", bits: int = 4, group_size: int = 64) -> Iterator[dict]:
        """What rounding to nearest does to a model's own weights; last of all {"layer", "edges", "before", "after", "losses"}."""
        token = CancelToken()
        workshop.engine.spec(model.strip())  # refuses models that whoever asks may not name
        yield from _as_json(workshop.look(model.strip(), int(bits), int(group_size), token), token)

    return look


def _push(workshop: Workshop) -> Callable[..., Json]:
    def push(folder: str, repo: str, token: str = "", private: bool = True) -> dict:
        """Upload a quantized or exported folder to the hub; for the page's owner. Returns {"address": ...}."""
        return {"address": workshop.push(folder, repo, token, private, CancelToken())}

    return push


def _as_json(events: Iterator[Any], token: CancelToken) -> Iterator[Json]:
    for gathered in pump(events, token):
        for event in gathered:
            if isinstance(event, Receipt):
                yield {"receipt": event.as_dict()}
            else:
                yield event if isinstance(event, dict) else asdict(event)
