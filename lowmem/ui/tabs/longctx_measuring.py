"""Measuring a long text: perplexity along it, hidden states, what is remembered, five ways to read on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.datasets.texts import MANUAL, Text, evaluation_text
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.generate.window_limits import check_stride
from lowmem.longctx import actions
from lowmem.longctx.curve import Span
from lowmem.longctx.options import StrategyOptions
from lowmem.longctx.strategies import Point, compare_strategies
from lowmem.measure.rows import write_atomically
from lowmem.plots.figure import to_png, to_svg
from lowmem.plots.longctx import perplexity_sheet, picture, to_csv
from lowmem.ui.html import longctx as render_longctx
from lowmem.ui.html import plan as render
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.i18n.edge import shown_sheet
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import Jobs
from lowmem.ui.parts.fields import widgets
from lowmem.ui.parts.runner import Runner, View, new_folder
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import Engine
from lowmem.ui.tabs.longctx_inputs import Inputs


class PerplexityMode:
    """Perplexity along the text: by windows over it, or through the cache."""

    key = "perplexity"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        self.way = gr.Radio(
            [(say("long_by_cache"), "cache"), (say("long_by_windows"), "windows")],
            value="cache",
            label=say("long_way"),
            elem_id="long-way",
        )
        self.runner = Runner(engine, jobs, "long-perplexity", say("long_perplexity_start"))
        self.result = gr.HTML(elem_id="long-perplexity-result")
        self.plot = gr.HTML(elem_id="long-perplexity-plot")

    def wire(self, tab: Inputs, sidebar: Sidebar) -> None:
        self.tab = tab
        inputs = [*tab.source, self.way, tab.stride, *tab.options]
        self.runner.wire(sidebar, inputs, [self.result, self.plot], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, way: str, stride: float, *values: Any
    ) -> tuple[Iterator[Any], View]:
        options = self.tab.read(*values)
        self.engine.require_model()
        if way == "windows":
            check_stride(options.window, int(stride))
        spans: list[Span] = []
        result = ""

        def events() -> Iterator[Any]:
            whole, session = self.tab.given(text, file, address, token), self.engine.session
            if way == "windows":
                yield from actions.sliding_perplexity(session, whole, options.window, int(stride), cancel=token)
            else:
                yield from actions.streaming_perplexity(session, whole, options, cancel=token)

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            spans.extend(event for event in gathered if isinstance(event, Span))
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.perplexity(receipt)
            if not spans:
                return [result, ""]
            places = [((span.start + span.end) / 2, span.perplexity) for span in spans]
            return [result, render_quantize.drawing(to_svg(perplexity_sheet(places)))]

        return events(), view


class HiddenMode:
    """Hidden states into a file."""

    key = "hidden"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        with gr.Row():
            self.layers = gr.Textbox(
                "-1", label=say("long_layers"), info=say("long_layers_help"), elem_id="long-layers"
            )
            self.format = gr.Dropdown(
                ["npy", "safetensors"], value="npy", label=say("long_format"), filterable=False, elem_id="long-format"
            )
        self.runner = Runner(engine, jobs, "long-hidden", say("long_hidden_start"))
        self.result = gr.HTML(elem_id="long-hidden-result")

    def wire(self, tab: Inputs, sidebar: Sidebar) -> None:
        self.tab = tab
        inputs = [*tab.source, self.layers, self.format, tab.stride, tab.window]
        self.runner.wire(sidebar, inputs, [self.result], self._start)

    def _start(
        self,
        token: CancelToken,
        text: str,
        file: str,
        address: str,
        layers: str,
        kind: str,
        stride: float,
        window: float,
    ) -> tuple[Iterator[Any], View]:
        self.engine.require_model()
        check_stride(int(window), int(stride))
        chosen = layer_list(layers)
        path = new_folder("hidden") / f"hidden_states.{kind}"
        result = ""

        def events() -> Iterator[Any]:
            whole = self.tab.given(text, file, address, token)
            yield from actions.hidden_states(
                self.engine.session, whole, int(window), int(stride), path, layers=chosen, cancel=token
            )

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.hidden(receipt, path)
            return [result]

        return events(), view


class RecallMode:
    """A fact is told, text follows, the fact is asked for."""

    key = "recall"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        gr.HTML(render.quiet(say("long_recall_help")))
        self.runner = Runner(engine, jobs, "long-recall", say("long_recall_start"))
        self.result = gr.HTML(elem_id="long-recall-result")

    def wire(self, tab: Inputs, sidebar: Sidebar) -> None:
        self.tab = tab
        self.runner.wire(sidebar, tab.options, [self.result], self._start)

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        options = self.tab.read(*values)
        self.engine.require_model()
        result = ""

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal result
            for receipt in (event for event in gathered if isinstance(event, Receipt)):
                result = render_longctx.recalls(receipt)
            return [result]

        return actions.recall(self.engine.session, evaluation_text(MANUAL).text, options, cancel=token), view


class ExerciseMode:
    """The course's second exercise: five ways to read on, side by side, each in a process of its own."""

    key = "exercise"

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine = engine
        gr.HTML(render.quiet(say("long_exercise_help")))
        with gr.Row():
            self.controls = widgets(StrategyOptions, ("tokens", "window", "sinks", "kv_bits", "points"), "exercise")
        self.runner = Runner(engine, jobs, "long-exercise", say("long_exercise_start"))
        self.table = gr.HTML(elem_id="long-exercise-table")
        self.plots = gr.HTML(elem_id="long-exercise-plots")
        self.files = gr.HTML(elem_id="long-exercise-files")

    def wire(self, tab: Inputs, sidebar: Sidebar) -> None:
        self.tab, self.sidebar = tab, sidebar
        inputs = [*tab.source, *self.controls.values(), *sidebar.limits]
        self.runner.wire(sidebar, inputs, [self.table, self.plots, self.files], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, *values: Any
    ) -> tuple[Iterator[Any], View]:
        options = build(StrategyOptions, dict(zip(self.controls, values, strict=False)))
        self.engine.access.check_reading(options.tokens)
        plan = self.engine.resident
        ref, precision = (plan.spec.ref, plan.precision) if plan else ("demo", "auto")
        budget = self.engine.child_budget(self.sidebar.budget_of(values[len(self.controls) :]))
        points: list[Point] = []

        def events() -> Iterator[Any]:
            given = text.strip() or file or address
            chosen = Text("text", self.tab.given(text, file, address, token)) if given else MANUAL
            yield from compare_strategies(ref, chosen, options, precision=precision, budget=budget, cancel=token)

        def view(gathered: Sequence[Any]) -> list[Any]:
            points.extend(event for event in gathered if isinstance(event, Point))
            if not points:
                return ["", "", ""]
            drawn = picture(points, columns=1)
            files = gr.skip() if gathered else _written(points, ref)
            return [render_longctx.points(points), render_quantize.drawing(to_svg(drawn)), files]

        return events(), view


def _written(points: Sequence[Point], ref: str) -> str:
    folder = new_folder("exercise")
    table = write_atomically(folder / "exercise.csv", to_csv(points))
    drawn = write_atomically(folder / "exercise.png", to_png(shown_sheet(picture(points, ref))))
    return render_longctx.link(table, say("csv")) + render_longctx.link(drawn, say("png"))


def layer_list(text: str) -> list[int]:
    """
    Raises:
        BadInput: not numbers with commas between.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{text[:40]!r} is not a list of layers.", "Write it like 0,6,-1.") from None
