"""Variants of a model side by side: a table that grows as rows finish, plots, files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.fields import describe
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.messages import msg
from lowmem.plots.figure import to_png, to_svg
from lowmem.plots.variants import picture
from lowmem.ui.html import parts
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.names import name
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.fields import read, widgets
from lowmem.ui.parts.models import model_dropdown, originals
from lowmem.ui.parts.runner import Runner, View
from lowmem.ui.service.results import new_folder
from lowmem.ui.tabs.sweep import SweepView

EXAMPLE = ("fp32", "int8", "hqq:4:64")
EXAMPLE_ON_GPU = ("fp16", "bnb8", "nf4")


class CompareView:
    """Creates its components in the current layout."""

    def __init__(self, context: Context) -> None:
        self.service, self.sidebar = context.services.compare, context.sidebar
        possible = self.service.variants()
        example = EXAMPLE if set(EXAMPLE) <= set(possible) else EXAMPLE_ON_GPU
        self.example_variants = [variant for variant in example if variant in possible]
        with gr.Column(elem_id="compare"):
            with gr.Row():
                self.model = model_dropdown(originals(context.engine), "compare-model", min_width=260)
                self.text = gr.Dropdown(
                    [(name("texts", key), key) for key in texts.NAMES],
                    value=texts.MANUAL,
                    label=msg("Evaluation text"),
                    info=msg("Perplexity and KL divergence are measured on this text."),
                    filterable=False,
                    elem_id="compare-text",
                    min_width=260,
                )
            self.variants = gr.CheckboxGroup(
                possible,
                value=self.example_variants,
                label=msg("Variants"),
                info=msg("A precision, or method:bits:group size. Each variant runs in its own process."),
                elem_id="compare-variants",
            )
            with gr.Accordion(msg("Measurement settings"), open=False, elem_id="compare-options"):
                fields = [option.name for option in describe(MeasureOptions)]
                self.options = widgets(MeasureOptions, fields, "measure")
            self._build_actions(context)
            self.table = gr.HTML(elem_id="compare-table")
            self.plots = gr.HTML(elem_id="compare-plots")
            self.notes = gr.HTML(elem_id="compare-notes")
            with gr.Row(visible=False, elem_classes="lm-actions") as self.files:
                self.csv = gr.DownloadButton(
                    msg("Download CSV"), size="sm", scale=0, min_width=150, elem_id="compare-csv"
                )
                self.png = gr.DownloadButton(
                    msg("Download PNG"), size="sm", scale=0, min_width=150, elem_id="compare-png"
                )
            SweepView(context, self.text, self.options)
        self._wire()

    def _build_actions(self, context: Context) -> None:
        with gr.Row(elem_classes="lm-actions"):
            self.example = gr.Button(
                msg("Compare FP32, INT8 and INT4"), variant="primary", scale=0, min_width=260, elem_id="compare-example"
            )
            self.button = gr.Button(msg("Compare selected"), scale=0, min_width=180, elem_id="compare-start")
            stop = gr.Button(msg("Stop"), visible=False, scale=0, min_width=90, elem_id="compare-stop")
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        self.runner = Runner(
            context,
            "compare",
            running={self.example: off, self.button: off, stop: gr.update(visible=True)},
            idle={self.example: on, self.button: on, stop: gr.update(visible=False)},
            stop=stop.click,
            progress=gr.HTML(elem_id="compare-progress"),
            notice=gr.HTML(elem_id="compare-notice"),
        )

    def _wire(self) -> None:
        inputs = [self.model, self.text, self.variants, *self.options.values(), *self.sidebar.limits]
        self.runner.wire(inputs, [self.table, self.plots, self.notes, self.files, self.csv, self.png], self._start)
        ticked = self.example.click(lambda: self.example_variants, None, self.variants, **QUICK)
        for trigger in (ticked.then, self.button.click):
            self.runner.on(trigger, begin=lambda: ["", "", "", gr.Row(visible=False)])

    def _start(
        self, token: CancelToken, model: str | None, text: str, variants: list[str], *values: Any
    ) -> tuple[Iterator[Any], View]:
        if not variants:
            raise BadInput(msg("No variant is selected."), msg("Select two or more."))
        model = (model or "").strip()
        options = read(MeasureOptions, tuple(self.options), values[: len(self.options)])
        budget = self.sidebar.budget_of(values[len(self.options) :])
        return self.service.compare(model, variants, text, options, budget, token), _view(model, text)


def _view(model: str, text: str) -> View:
    rows: list[Row] = []
    notes: list[str] = []

    def view(gathered: Sequence[Any]) -> list[Any]:
        rows.extend(event for event in gathered if isinstance(event, Row))
        notes.extend(note for event in gathered if isinstance(event, Receipt) for note in event.notes)
        if not rows:
            return ["", "", "", gr.Row(visible=False), gr.skip(), gr.skip()]
        drawn = parts.drawing(to_svg(picture(rows, model, text)))
        table = [render_quantize.comparison(rows), drawn, "".join(map(parts.quiet, notes))]
        return [*table, *([gr.skip()] * 3 if gathered else _files(rows, model, text))]

    return view


def _files(rows: list[Row], model: str, text: str) -> list[Any]:
    folder = new_folder("compare")
    table = write_atomically(folder / "comparison.csv", to_csv(rows))
    drawn = write_atomically(folder / "comparison.png", to_png(picture(rows, model, text)))
    return [gr.Row(visible=True), gr.DownloadButton(value=str(table)), gr.DownloadButton(value=str(drawn))]
