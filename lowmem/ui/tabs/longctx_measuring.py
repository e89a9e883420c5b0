"""Measuring on a long text: perplexity along it, hidden states, recall, cache strategies side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.longctx.curve import Span
from lowmem.longctx.options import StrategyOptions, parse_layers
from lowmem.longctx.strategies import Point
from lowmem.measure.rows import write_atomically
from lowmem.messages import msg
from lowmem.plots.figure import to_png, to_svg
from lowmem.plots.longctx import perplexity_sheet, picture, to_csv
from lowmem.ui.html import longctx as render_longctx
from lowmem.ui.html import parts
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.fields import widgets
from lowmem.ui.parts.runner import ButtonRunner, View, latest
from lowmem.ui.service.longctx import TextSource
from lowmem.ui.service.results import new_folder
from lowmem.ui.tabs.longctx_inputs import Inputs

Started = tuple[Iterator[Any], View]


class PerplexityMode:
    """Perplexity along the text: in windows over it, or through the cache."""

    key = "perplexity"

    def __init__(self, context: Context) -> None:
        self.service = context.services.longctx
        self.reading = gr.Radio(
            [
                (msg("Streaming through the cache (uses window, sinks and cache type)"), "cache"),
                (msg("Sliding windows (uses window and stride)"), "windows"),
            ],
            value="cache",
            label=msg("Evaluation"),
            elem_id="long-reading",
        )
        self.runner = ButtonRunner(context, "long-perplexity", msg("Measure perplexity"))
        self.result = gr.HTML(elem_id="long-perplexity-result")
        self.plot = gr.HTML(elem_id="long-perplexity-plot")

    def wire(self, tab: Inputs) -> None:
        self.tab = tab
        inputs = [*tab.source, self.reading, tab.stride, *tab.options]
        self.runner.wire(inputs, [self.result, self.plot], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, reading: str, stride: float, *values: Any
    ) -> Started:
        step = int(stride) if reading == "windows" else 0
        events = self.service.perplexity(TextSource(text, file, address), self.tab.read(*values), step, token)
        spans: list[Span] = []
        result = _receipt_view(render_longctx.perplexity)

        def view(gathered: Sequence[Any]) -> list[Any]:
            spans.extend(event for event in gathered if isinstance(event, Span))
            places = [((span.start + span.end) / 2, span.perplexity) for span in spans]
            return [*result(gathered), parts.drawing(to_svg(perplexity_sheet(places))) if places else ""]

        return events, view


class HiddenMode:
    """Hidden states into a file."""

    key = "hidden"

    def __init__(self, context: Context) -> None:
        self.service = context.services.longctx
        with gr.Row():
            self.layers = gr.Textbox(
                "-1",
                label=msg("Layers"),
                info=msg("0 for the embeddings, i for the output of block i, -1 for the last; separated by commas."),
                elem_id="long-layers",
            )
            self.format = gr.Dropdown(
                ["npy", "safetensors"], value="npy", label=msg("File"), filterable=False, elem_id="long-format"
            )
        self.runner = ButtonRunner(context, "long-hidden", msg("Compute hidden states"))
        self.result = gr.HTML(elem_id="long-hidden-result")

    def wire(self, tab: Inputs) -> None:
        inputs = [*tab.source, self.layers, self.format, tab.stride, tab.window]
        self.runner.wire(inputs, [self.result], self._start)

    def _start(
        self,
        token: CancelToken,
        text: str,
        file: str,
        address: str,
        layers: str,
        format: str,
        stride: float,
        window: float,
    ) -> Started:
        source = TextSource(text, file, address)
        events = self.service.hidden_states(source, int(window), int(stride), parse_layers(layers), format, token)
        return events, _receipt_view(render_longctx.hidden)


class RecallMode:
    """Needle test: state a word, continue with text, ask for the word."""

    key = "recall"

    def __init__(self, context: Context) -> None:
        self.service = context.services.longctx
        gr.HTML(
            parts.quiet(
                msg(
                    "Places a secret word in the context, continues with other text, and asks for the word half a window and two windows later (2,048 tokens later without a window)."
                )
            )
        )
        self.runner = ButtonRunner(context, "long-recall", msg("Test recall"))
        self.result = gr.HTML(elem_id="long-recall-result")

    def wire(self, tab: Inputs) -> None:
        self.tab = tab
        self.runner.wire(tab.options, [self.result], self._start)

    def _start(self, token: CancelToken, *values: Any) -> Started:
        return self.service.recall(self.tab.read(*values), token), _receipt_view(render_longctx.recalls)


class StrategiesMode:
    """Five cache strategies side by side, each in its own child process: the course's second exercise."""

    key = "strategies"

    def __init__(self, context: Context) -> None:
        self.engine, self.service, self.sidebar = context.engine, context.services.longctx, context.sidebar
        gr.HTML(
            parts.quiet(
                msg(
                    "Streams the text above (or Python's manual) with a full cache, a window without sinks, a window with sinks, a window recomputed for every token, and a quantized cache, each in its own process. Uses the resident model, or the demo. Takes a few minutes."
                )
            )
        )
        with gr.Row():
            self.controls = widgets(StrategyOptions, ("tokens", "window", "sinks", "kv_bits", "points"), "strategies")
        self.runner = ButtonRunner(context, "long-strategies", msg("Compare cache strategies"))
        self.table = gr.HTML(elem_id="long-strategies-table")
        self.plots = gr.HTML(elem_id="long-strategies-plots")
        self.files = gr.HTML(elem_id="long-strategies-files")

    def wire(self, tab: Inputs) -> None:
        inputs = [*tab.source, *self.controls.values(), *self.sidebar.limits]
        self.runner.wire(inputs, [self.table, self.plots, self.files], self._start)

    def _start(self, token: CancelToken, text: str, file: str, address: str, *values: Any) -> Started:
        options = build(StrategyOptions, dict(zip(self.controls, values, strict=False)))
        plan = self.engine.resident
        usable = plan is not None and not self.engine.access.is_private(plan.spec.source.folder)
        ref, precision = (plan.spec.ref, plan.precision) if plan and usable else ("demo", "auto")
        budget = self.sidebar.budget_of(values[len(self.controls) :])
        source = TextSource(text, file, address)
        events = self.service.compare_strategies(ref, source, options, budget, token, precision)
        points: list[Point] = []

        def view(gathered: Sequence[Any]) -> list[Any]:
            points.extend(event for event in gathered if isinstance(event, Point))
            if not points:
                return ["", "", ""]
            drawn = picture(points, columns=1)
            files = gr.skip() if gathered else _written(points, ref)
            return [render_longctx.points(points), parts.drawing(to_svg(drawn)), files]

        return events, view


def _receipt_view(render: Callable[[Receipt], str]) -> View:
    """The receipt as HTML, nothing before it."""
    return latest(Receipt, lambda receipt: [render(receipt)], [""])


def _written(points: Sequence[Point], ref: str) -> str:
    folder = new_folder("strategies")
    table = write_atomically(folder / "strategies.csv", to_csv(points))
    drawn = write_atomically(folder / "strategies.png", to_png(picture(points, ref)))
    return parts.link(table, msg("Download CSV")) + parts.link(drawn, msg("Download PNG"))
