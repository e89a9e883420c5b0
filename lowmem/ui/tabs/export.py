"""The Export tab: a model as a graph, its proof, a race against PyTorch, and back into Generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.export import tensorrt
from lowmem.export.run import export_isolated, forecast, output_folder, race
from lowmem.fields import build
from lowmem.machine.baseline import runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import local_folder
from lowmem.planning.graph_options import LABELS, ExportOptions
from lowmem.plots.engines import graph_benchmark
from lowmem.plots.figure import to_svg
from lowmem.settings import settings
from lowmem.ui.html import export as export_render
from lowmem.ui.html import plan as render
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import QUICK, Jobs, notice
from lowmem.ui.parts.push import PushBox
from lowmem.ui.parts.runner import Runner, View
from lowmem.ui.parts.setup import Setup
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import AUTO
from lowmem.ui.service.quantizing import Workshop
from lowmem.ui.tabs.quantize_form import originals

GROUPS = (16, 32, 64)


class ExportTab:
    """Layout and wiring of the tab.

    Args:
        tabs, setup: where a result is loaded.
    """

    def __init__(self, workshop: Workshop, jobs: Jobs, sidebar: Sidebar, tabs: gr.Tabs, setup: Setup) -> None:
        self.workshop, self.engine, self.sidebar = workshop, workshop.engine, sidebar
        self.receipt = gr.State(None)
        with gr.Row(elem_id="export"):
            with gr.Column(scale=3, min_width=300, elem_id="export-form"):
                self._build_form()
            with gr.Column(scale=2, min_width=300, elem_id="export-side"):
                self.card = gr.HTML(elem_id="export-card")
                self.runner = Runner(self.engine, jobs, "export", say("start_export"))
                self.problem = gr.HTML(elem_id="export-problem")
        with gr.Column(visible=False, elem_id="export-result") as self.result:
            self.table = gr.HTML(elem_id="export-receipt")
            with gr.Row(elem_classes="lm-actions"):
                self.load = gr.Button(
                    say("load_result"), variant="primary", scale=0, min_width=220, elem_id="export-load"
                )
            self.race = Runner(self.engine, jobs, "race", say("start_race"))
            self.plot = gr.HTML(elem_id="race-plot")
            self.push = PushBox(workshop, jobs, "export-push")
        self._wire(tabs, setup)

    def _build_form(self) -> None:
        self.model = gr.Dropdown(
            originals(self.workshop),
            value="demo",
            allow_custom_value=True,
            label=say("model"),
            info=say("model_help"),
            elem_id="export-model",
        )
        missing = tensorrt.available(self.engine.hardware())
        formats = [("ONNX", "onnx"), *([] if missing else [("TensorRT", "tensorrt")])]
        self.format = gr.Radio(formats, value="onnx", label=say("export_format"), elem_id="export-format")
        gr.HTML(render.pairs([("TensorRT", missing)] if missing else [], say("not_here")))
        self.precision = gr.Radio(
            [(label, key) for key, label in LABELS.items()],
            value="int8",
            label=say("precision"),
            elem_id="export-precision",
        )
        with gr.Row():
            self.group = gr.Dropdown(
                [(str(size), size) for size in GROUPS],
                value=32,
                label=say("group"),
                info=say("group_help"),
                visible=False,
                filterable=False,
                elem_id="export-group",
                min_width=200,
            )
            self.fast = gr.Radio(
                [(say("automatic"), "auto"), (say("export_on"), "on"), (say("export_off"), "off")],
                value="auto",
                label=say("export_fast"),
                info=say("export_fast_help"),
                elem_id="export-fast",
                min_width=260,
            )
        with gr.Accordion(say("advanced"), open=False, elem_id="export-advanced"):
            self.fused = gr.Checkbox(
                True, label=say("export_fused"), info=say("export_fused_help"), elem_id="export-fused"
            )
            self.optimise = gr.Checkbox(
                False, label=say("export_optimise"), info=say("export_optimise_help"), elem_id="export-optimise"
            )
        own = [self.model, self.format, self.precision, self.group, self.fast, self.fused, self.optimise]
        self.controls: list[Any] = [*own, *self.sidebar.limits]

    def _wire(self, tabs: gr.Tabs, setup: Setup) -> None:
        priced = [self.card, self.runner.run, self.problem]
        for control in self.controls:
            control.change(self._price, self.controls, priced, trigger_mode="always_last", **QUICK)
        self.precision.change(lambda key: gr.Dropdown(visible=key == "int4"), self.precision, self.group, **QUICK)
        self.runner.wire(
            self.sidebar, self.controls, [self.result, self.table, self.receipt, self.plot, self.load], self._start
        )
        self.race.wire(self.sidebar, [self.receipt, *self.controls], [self.plot], self._start_race)
        self.push.wire(self.receipt)
        self._fit_context = setup.fit_context
        chosen = self.load.click(
            self._choose,
            [self.receipt, setup.context],
            [tabs, setup.model, setup.precision, setup.device, setup.context],
            **QUICK,
        )
        setup.load_on(chosen.then)

    def shown(self, event: Any) -> Any:
        """After `event`, price the controls as they stand."""
        self.push.shown(event)
        return event.then(self._price, self.controls, [self.card, self.runner.run, self.problem], **QUICK)

    def _options(self, values: Sequence[Any]) -> tuple[str, ExportOptions, MemoryBudget]:
        """Model, options, and the budget of the process that exports."""
        model, kind, precision, group, fast, fused, optimise, *limits = values
        options = build(
            ExportOptions,
            {
                "format": kind,
                "precision": precision,
                "group_size": group,
                "fast_prefill": fast,
                "fused": fused,
                "optimise": optimise,
            },
        )
        return (model or "").strip(), options, self.engine.child_budget(self.sidebar.budget_of(limits))

    def _price(self, *values: Any) -> list[Any]:
        try:
            model, options, budget = self._options(values)
            spec = self.engine.exportable(model)
            expected = forecast(spec, options, runtime_bytes(), budget.limit("ram"))
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False)]
        card = export_render.card(expected, spec.size_on_disk)
        return [card, gr.Button(interactive=expected.verdict != "over"), ""]

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        model, options, budget = self._options(values)
        out = output_folder(self.engine.exportable(model).name, options)
        asked = {name: getattr(options, name) for name in options.__slots__}
        events = export_isolated(model, out, asked, budget=budget, allow_paths=not self.engine.public, cancel=token)
        made: list[Receipt] = []

        def view(gathered: Sequence[Any]) -> list[Any]:
            made.extend(event for event in gathered if isinstance(event, Receipt))
            if not made:
                return [gr.Column(visible=False), "", None, "", gr.skip()]
            kept = made[-1].as_dict() | {"ref": model}
            writes = made[-1].details["kind"] != "encoder"
            return [gr.Column(visible=True), export_render.receipt(made[-1]), kept, "", gr.Button(visible=writes)]

        return events, view

    def _start_race(
        self, token: CancelToken, receipt: dict[str, Any] | None, *values: Any
    ) -> tuple[Iterator[Any], View]:
        if not receipt:
            raise BadInput("There is no exported model to race.", "Export one first.")
        events = race(receipt["ref"], _own_result(receipt), token, self._options(values)[2])
        found: list[dict[str, Any]] = []

        def view(gathered: Sequence[Any]) -> list[Any]:
            found.extend(event for event in gathered if isinstance(event, dict))
            if not found:
                return [gr.skip()]
            drawn = "".join(render_quantize.drawing(to_svg(sheet)) for sheet in graph_benchmark(found[-1]))
            return [f'<div class="lm-side">{drawn}</div>{export_render.race_table(found[-1])}']

        return events, view

    def _choose(self, receipt: dict[str, Any], context: float) -> list[Any]:
        folder = str(_own_result(receipt))
        models = [(say("automatic"), AUTO), *self.engine.catalog()]
        if folder not in [ref for _, ref in models]:
            models.append((Path(folder).name, folder))
        return [
            gr.Tabs(selected="generate"),
            gr.Dropdown(models, value=folder),
            AUTO,
            AUTO,
            self._fit_context(folder, context),
        ]


def _own_result(receipt: dict[str, Any]) -> Path:
    """The folder of a receipt, which must be one of this page's.

    Raises:
        BadInput: it is elsewhere.
    """
    folder = Path(receipt["details"]["folder"]).resolve()
    if not folder.is_relative_to(settings().outputs.resolve()) or local_folder(str(folder)) is None:
        raise BadInput("Only results of this page can be used.", "Export a model first.")
    return folder
