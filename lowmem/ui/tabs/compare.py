"""Variants of a model side by side: a table that grows as rows finish, plots, files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.events import Receipt, Step
from lowmem.fields import describe
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.plots.figure import to_png, to_svg
from lowmem.plots.variants import picture
from lowmem.ui.html import plan as render
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.i18n.edge import shown_sheet
from lowmem.ui.i18n.strings import name, say
from lowmem.ui.parts.bind import HEAVY, QUICK, Jobs, notice, pump, stops
from lowmem.ui.parts.fields import read, widgets
from lowmem.ui.parts.runner import new_folder
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.quantizing import Workshop
from lowmem.ui.tabs.quantize_form import originals
from lowmem.ui.tabs.sweep import SweepView

KIND = "compare"
EXERCISE = ("fp32", "int8", "hqq:4:64")
EXERCISE_ON_GPU = ("fp16", "bnb8", "nf4")


class CompareView:
    """Built where it stands in the layout."""

    def __init__(self, workshop: Workshop, jobs: Jobs, sidebar: Sidebar) -> None:
        self.workshop, self.jobs, self.sidebar = workshop, jobs, sidebar
        possible = workshop.variants()
        exercise = EXERCISE if set(EXERCISE) <= set(possible) else EXERCISE_ON_GPU
        self.exercise_variants = [variant for variant in exercise if variant in possible]
        with gr.Column(elem_id="compare"):
            with gr.Row():
                self.model = gr.Dropdown(
                    originals(workshop),
                    value="demo",
                    allow_custom_value=True,
                    label=say("model"),
                    info=say("model_help"),
                    elem_id="compare-model",
                    min_width=260,
                )
                self.text = gr.Dropdown(
                    [(name("texts", key), key) for key in texts.NAMES],
                    value=texts.MANUAL,
                    label=say("measured_on"),
                    info=say("compare_help"),
                    filterable=False,
                    elem_id="compare-text",
                    min_width=260,
                )
            self.variants = gr.CheckboxGroup(
                possible, value=self.exercise_variants, label=say("variants"), elem_id="compare-variants"
            )
            with gr.Accordion(say("measure_options"), open=False, elem_id="compare-options"):
                fields = [option.name for option in describe(MeasureOptions)]
                self.options = widgets(MeasureOptions, fields, "measure")
            with gr.Row(elem_classes="lm-actions"):
                self.exercise = gr.Button(
                    say("exercise"), variant="primary", scale=0, min_width=260, elem_id="compare-exercise"
                )
                self.run = gr.Button(say("run_compare"), scale=0, min_width=180, elem_id="compare-start")
                self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id="compare-stop")
            self.progress = gr.HTML(elem_id="compare-progress")
            self.notice = gr.HTML(elem_id="compare-notice")
            self.table = gr.HTML(elem_id="compare-table")
            self.plots = gr.HTML(elem_id="compare-plots")
            self.notes = gr.HTML(elem_id="compare-notes")
            with gr.Row(visible=False, elem_classes="lm-actions") as self.files:
                self.csv = gr.DownloadButton(say("csv"), size="sm", scale=0, min_width=150, elem_id="compare-csv")
                self.png = gr.DownloadButton(say("png"), size="sm", scale=0, min_width=150, elem_id="compare-png")
            SweepView(workshop, jobs, sidebar, self.text, self.options)
        self._wire()

    def _wire(self) -> None:
        outputs = [
            self.exercise,
            self.run,
            self.stop,
            self.progress,
            self.notice,
            self.table,
            self.plots,
            self.notes,
            self.files,
            self.csv,
            self.png,
        ]
        inputs = [self.model, self.text, self.variants, *self.options.values(), *self.sidebar.limits]
        ticked = self.exercise.click(lambda: self.exercise_variants, None, self.variants, **QUICK)
        for trigger in (ticked.then, self.run.click):
            ran = trigger(self._begin, None, outputs[:9], **QUICK).then(self._run, inputs, outputs, **HEAVY)
            self.sidebar.after(ran)
        stops(self.stop.click, self.jobs, KIND, self.progress)

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        busy = self.workshop.engine.busy
        note = render.progress(Step(0, 0, say("waiting", busy=busy) if busy else say("starting")))
        off = gr.Button(interactive=False)
        return [off, off, gr.Button(visible=True), note, "", "", "", "", gr.Row(visible=False)]

    def _run(self, request: gr.Request, model: str, text: str, variants: list[str], *values: Any) -> Iterator[Any]:
        rows: list[Row] = []
        trouble, receipt = "", None
        given, limits = values[: len(self.options)], values[len(self.options) :]
        try:
            with self.jobs.running(request, KIND) as token:
                if not variants:
                    raise BadInput("No variant is ticked.", "Tick two or more.")
                options = read(MeasureOptions, tuple(self.options), given)
                budget = self.sidebar.budget_of(limits)
                events = self.workshop.compare((model or "").strip(), variants, text, options, token, budget)
                for gathered in pump(events, token):
                    fresh = [event for event in gathered if isinstance(event, Row)]
                    steps = [event for event in gathered if isinstance(event, Step)]
                    receipt = next((event for event in gathered if isinstance(event, Receipt)), receipt)
                    rows += fresh
                    moved = render.progress(steps[-1]) if steps else gr.skip()
                    shown = _shown(rows, model, text) if fresh else [gr.skip()] * 2
                    if fresh or steps:
                        yield [*[gr.skip()] * 3, moved, gr.skip(), *shown, *[gr.skip()] * 4]
        except Exception as error:
            trouble = notice(error)
        yield [
            gr.Button(interactive=True),
            gr.Button(interactive=True),
            gr.Button(visible=False),
            "",
            trouble,
            *_shown(rows, model, text),
            _notes(receipt),
            *_files(rows, model, text),
        ]


def _shown(rows: list[Row], model: str, text: str) -> list[str]:
    if not rows:
        return ["", ""]
    return [render_quantize.comparison(rows), render_quantize.drawing(to_svg(picture(rows, model, text)))]


def _notes(receipt: Receipt | None) -> str:
    return "".join(render.quiet(note) for note in receipt.notes) if receipt else ""


def _files(rows: list[Row], model: str, text: str) -> list[Any]:
    if not rows:
        return [gr.Row(visible=False), gr.skip(), gr.skip()]
    folder = new_folder("compare")
    table = write_atomically(folder / "comparison.csv", to_csv(rows))
    drawn = write_atomically(folder / "comparison.png", to_png(shown_sheet(picture(rows, model, text))))
    return [gr.Row(visible=True), gr.DownloadButton(value=str(table)), gr.DownloadButton(value=str(drawn))]
