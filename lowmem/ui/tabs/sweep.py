"""Methods x settings x models from the Compare view: a table and plots that grow as cells finish."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lowmem import quant
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import Variant, make_variant, parse_variant
from lowmem.messages import msg
from lowmem.plots.figure import to_svg
from lowmem.plots.variants import picture
from lowmem.quant import get
from lowmem.quant.base import BITS
from lowmem.sweep.grid import Grid
from lowmem.sweep.table import ordered
from lowmem.ui.html import parts
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.language import Html
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.fields import read
from lowmem.ui.parts.models import originals
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.tabs.quantize_form import GROUPS

SAMPLES = 16
"""Calibration samples that a sweep starts with: a quarter of the usual, for a first overview."""


class SweepView:
    """Creates its components in the current layout.

    Args:
        text: the dropdown with the evaluation text.
        options: controls of `MeasureOptions`, by field.
    """

    def __init__(self, context: Context, text: gr.Dropdown, options: dict[str, Any]) -> None:
        self.context, self.service, self.sidebar = context, context.services.compare, context.sidebar
        self._fields = tuple(options)
        with gr.Accordion(msg("Sweep: methods and settings"), open=False, elem_id="sweep"):
            gr.HTML(
                parts.quiet(
                    msg(
                        "Measures every combination of model, method and setting on the text above, as many in parallel as fit the budget. The table is saved, and a stopped sweep resumes where it left off."
                    )
                )
            )
            self._build_form()
            self.count = gr.HTML(
                Html(lambda: self._counted(*(control.value for control in self.chosen))), elem_id="sweep-count"
            )
            self.runner = ButtonRunner(context, "sweep", msg("Start sweep"))
            self.table = gr.HTML(elem_id="sweep-table")
            self.plots = gr.HTML(elem_id="sweep-plots")
            self.notes = gr.HTML(elem_id="sweep-notes")
        for control in self.chosen:
            control.change(self._counted, self.chosen, self.count, trigger_mode="always_last", **QUICK)
        inputs = [*self.chosen, text, *options.values(), *self.sidebar.limits]
        self.runner.wire(inputs, [self.table, self.plots, self.notes], self._start)

    def _build_form(self) -> None:
        refused = self.context.services.quantize.methods()
        usable = [(get(method).label, method) for method in quant.METHODS if refused[method] is None]
        quick = [method for _, method in usable if get(method).presets and not get(method).calibrated]
        precisions = [name for name in self.service.variants() if ":" not in name]
        self.models = gr.Dropdown(
            originals(self.context.engine),
            value=["demo"],
            multiselect=True,
            allow_custom_value=True,
            label=msg("Models"),
            elem_id="sweep-models",
        )
        self.precisions = gr.CheckboxGroup(
            precisions,
            value=[name for name in ("int8", "bf16") if name in precisions],
            label=msg("Unquantized, precision"),
            elem_id="sweep-precisions",
        )
        self.methods = gr.CheckboxGroup(usable, value=quick, label=msg("Methods"), elem_id="sweep-methods")
        with gr.Row():
            self.bits = gr.CheckboxGroup(
                [(str(bits), bits) for bits in BITS],
                value=[3, 4],
                label=msg("Bits"),
                elem_id="sweep-bits",
                min_width=200,
            )
            self.groups = gr.CheckboxGroup(
                [(msg("A whole row") if size < 0 else str(size), size) for size in GROUPS],
                value=[64],
                label=msg("Group size"),
                elem_id="sweep-groups",
                min_width=240,
            )
            self.zeros = gr.CheckboxGroup(
                [(msg("With"), False), (msg("Without (symmetric)"), True)],
                value=[False],
                label=msg("Zero points"),
                elem_id="sweep-zeros",
                min_width=240,
            )
        self.samples = gr.Slider(
            1, 256, value=SAMPLES, step=1, label=msg("Samples"), info=msg("For GPTQ and AWQ; fewer samples are faster."), buttons=[],
            elem_id="sweep-samples",
        )  # fmt: skip
        self.chosen: list[Any] = [
            self.models, self.precisions, self.methods, self.bits, self.groups, self.zeros, self.samples,
        ]  # fmt: skip

    def _counted(self, *values: Any) -> str:
        models, *settings = values
        variants = _variants(*settings)
        reference = self.service.reference()
        if not models or not variants:
            return parts.quiet(msg("Choose a model, and a precision or a method with a supported setting."))
        count = len(models) * len({reference, *(variant.name for variant in variants)})
        return parts.quiet(
            msg("{count} runs, including each model in {reference} as the reference.", count=count, reference=reference)
        )

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        models, *settings = values[: len(self.chosen)]
        text, *rest = values[len(self.chosen) :]
        measure, limits = rest[: len(self._fields)], rest[len(self._fields) :]
        variants = _variants(*settings)
        if not models or not variants:
            raise BadInput(
                msg("There is nothing to sweep."),
                msg("Choose a model, and a precision or a method with a supported setting."),
            )
        grid = Grid(
            models=tuple(dict.fromkeys(model.strip() for model in models)),
            variants=tuple(variants),
            reference=parse_variant(self.service.reference()),
            text=text,
            options=read(MeasureOptions, self._fields, measure),
        )
        return self.service.sweep(grid, self.sidebar.budget_of(limits), token), _view(grid)


def _variants(
    precisions: Sequence[str],
    methods: Sequence[str],
    bits: Sequence[int],
    groups: Sequence[int],
    zeros: Sequence[bool],
    samples: float,
) -> list[Variant]:
    """Every precision, and every method with every setting that it has; each once."""
    found = [parse_variant(name) for name in precisions or ()]
    for method, width, group, symmetric in itertools.product(methods or (), bits or (), groups or (), zeros or ()):
        settings = {"bits": width, "group_size": group, "symmetric": symmetric}
        if get(method).calibrated:
            settings["samples"] = int(samples)
        try:
            found.append(make_variant(method, settings))
        except BadInput:  # AWQ has 4 bits only, and so on
            continue
    return list(dict.fromkeys(found))


def _view(grid: Grid) -> View:
    """What the outputs become as rows come: table, plots, notes with the files at the end."""
    rows: list[Row] = []
    receipts: list[Receipt] = []
    several = len(grid.models) > 1

    def view(gathered: Sequence[Any]) -> list[Any]:
        for row in (event for event in gathered if isinstance(event, Row)):
            rows[:] = [one for one in rows if (one.model, one.variant) != (row.model, row.variant)] + [row]
        receipts.extend(event for event in gathered if isinstance(event, Receipt))
        if not rows:
            return ["", "", ""]
        table_rows = [
            replace(row, variant=f"{Path(row.model).name} {row.variant}" if several else row.variant)
            for row in ordered(rows, grid.cells())
        ]
        title = ", ".join(Path(model).name for model in grid.models)
        drawn = parts.drawing(to_svg(picture(table_rows, title, grid.text)))
        notes = "".join(parts.quiet(note) for receipt in receipts for note in receipt.notes)
        files = "".join(parts.files(Path(receipt.details["folder"])) for receipt in receipts)
        return [render_quantize.comparison(table_rows), drawn, notes + files]

    return view
