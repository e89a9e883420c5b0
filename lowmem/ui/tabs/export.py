"""The Export tab: a model as a graph, verified against the original, timed against PyTorch, loaded into Generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.export import tensorrt
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import msg
from lowmem.planning.graph_options import LABELS, ExportOptions
from lowmem.plots.engines import graph_benchmark
from lowmem.plots.figure import to_svg
from lowmem.ui.html import export as export_render
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.parts.estimate import EstimateView
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.learn import Learn
from lowmem.ui.parts.models import model_dropdown, originals
from lowmem.ui.parts.push import PushBox
from lowmem.ui.parts.runner import ButtonRunner, View, latest

GROUPS = (16, 32, 64)
OPTIONS = ("format", "precision", "group_size", "fast_prefill", "fused", "optimise")


class ExportTab:
    """Layout and wiring of the tab."""

    def __init__(self, context: Context) -> None:
        self.engine, self.service, self.sidebar = context.engine, context.services.export, context.sidebar
        self.receipt = gr.State(None)
        with gr.Row(elem_id="export"):
            with gr.Column(scale=3, min_width=300, elem_id="export-form"):
                self._build_form()
            with gr.Column(scale=2, min_width=300, elem_id="export-side"):
                self.card = gr.HTML(elem_id="export-card")
                self.runner = ButtonRunner(context, "export", msg("Export"))
                self.problem = gr.HTML(elem_id="export-problem")
        with gr.Column(visible=False, elem_id="export-result") as self.result:
            self.table = gr.HTML(elem_id="export-receipt")
            with gr.Row(elem_classes="lm-actions"):
                self.load = gr.Button(
                    msg("Load into Generate"), variant="primary", scale=0, min_width=220, elem_id="export-load"
                )
            self.benchmark = ButtonRunner(context, "benchmark", msg("Benchmark against PyTorch"))
            self.plot = gr.HTML(elem_id="benchmark-plot")
            PushBox(context, self.receipt, "export-push")
        Learn(context.engine, "export", self.model)
        self._wire(context)

    def _build_form(self) -> None:
        self.model = model_dropdown(originals(self.engine), "export-model")
        missing = tensorrt.available(self.engine.hardware())
        formats = [("ONNX", "onnx"), *([] if missing else [("TensorRT", "tensorrt")])]
        self.format = gr.Radio(formats, value="onnx", label=msg("Format"), elem_id="export-format")
        gr.HTML(Html(lambda: render.refusals([("TensorRT", missing)] if missing else [], msg("Not on this machine"))))
        self.precision = gr.Radio(
            [(label, key) for key, label in LABELS.items()],
            value="int8",
            label=msg("Precision"),
            elem_id="export-precision",
        )
        with gr.Row():
            self.group = gr.Dropdown(
                [(str(size), size) for size in GROUPS],
                value=32,
                label=msg("Group size"),
                info=msg("Weights that share a scale. Smaller groups are more precise and take more space."),
                visible=False,
                filterable=False,
                elem_id="export-group",
                min_width=200,
            )
            self.fast = gr.Radio(
                [(msg("Automatic"), "auto"), (msg("On"), "on"), (msg("Off"), "off")],
                value="auto",
                label=msg("Fast prefill"),
                info=msg(
                    "A second graph in dynamic int8 processes prompts about twice as fast and takes one byte per weight. Automatic: only with int8."
                ),
                elem_id="export-fast",
                min_width=260,
            )
        with gr.Accordion(msg("Advanced"), open=False, elem_id="export-advanced"):
            self.fused = gr.Checkbox(
                True,
                label=msg("Fused graph"),
                info=msg(
                    "Uses ONNX Runtime's fused operators and updates the KV cache in place. Off: standard operators only."
                ),
                elem_id="export-fused",
            )
            self.optimise = gr.Checkbox(
                False,
                label=msg("Optimize"),
                info=msg(
                    "For graphs that are not fused: runs ONNX Runtime's optimizer and reports nodes, size and latency before and after."
                ),
                elem_id="export-optimise",
            )
        own = [self.model, self.format, self.precision, self.group, self.fast, self.fused, self.optimise]
        self.controls: list[Any] = [*own, *self.sidebar.limits]

    def _wire(self, context: Context) -> None:
        outputs = (self.card, self.runner.button, self.problem)
        self.estimate = EstimateView(context, self.controls, outputs, self._estimate, self._measure)
        self.precision.change(lambda key: gr.Dropdown(visible=key == "int4"), self.precision, self.group, **QUICK)
        self.runner.wire(self.controls, [self.result, self.table, self.receipt, self.plot, self.load], self._start)
        self.benchmark.wire([self.receipt, *self.sidebar.limits], [self.plot], self._start_benchmark)
        context.load_result(self.load.click, self.receipt)

    def _request(self, values: Sequence[Any]) -> tuple[str, ExportOptions, MemoryBudget]:
        """Model, options and budget.

        Raises:
            BadInput: an option is outside its range.
        """
        model, *rest = values
        options = build(ExportOptions, dict(zip(OPTIONS, rest, strict=False)))
        return (model or "").strip(), options, self.sidebar.budget_of(rest[len(OPTIONS) :])

    def _estimate(self, *values: Any) -> tuple[str, bool, str]:
        request = self._request(values)
        expected = self.service.estimate(*request)
        card = export_render.card(expected, self.engine.spec(request[0], encoders=True).size_on_disk)
        return card, expected.verdict == "over", ""

    def _measure(self, *values: Any) -> None:
        with suppress(Exception):  # `_estimate` shows the error
            model, options, _ = self._request(values)
            self.service.measure(model, options)

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        request = self._request(values)

        def show(made: Receipt) -> list[Any]:
            receipt, generates = made.as_dict() | {"ref": request[0]}, made.details["kind"] != "encoder"
            return [gr.Column(visible=True), export_render.receipt(made), receipt, "", gr.Button(visible=generates)]

        nothing = [gr.Column(visible=False), "", None, "", gr.skip()]
        return self.service.export(*request, token), latest(Receipt, show, nothing)

    def _start_benchmark(
        self, token: CancelToken, receipt: dict[str, Any] | None, *limits: float
    ) -> tuple[Iterator[Any], View]:
        if not receipt:
            raise BadInput(msg("There is no exported model to benchmark."), msg("Export one first."))

        def show(found: dict[str, Any]) -> list[Any]:
            plots = "".join(parts.drawing(to_svg(figure)) for figure in graph_benchmark(found))
            return [f'<div class="lm-side">{plots}</div>{export_render.benchmark_table(found)}']

        folder, budget = receipt["details"]["folder"], self.sidebar.budget_of(limits)
        return self.service.benchmark(folder, receipt["ref"], budget, token), latest(dict, show, [gr.skip()])


TAB = Tab("export", msg("Export"), ExportTab)
