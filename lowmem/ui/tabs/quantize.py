"""The Quantize tab: make a smaller checkpoint, compare variants, see how it works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.messages import msg
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.parts.estimate import EstimateView
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.learn import Learn
from lowmem.ui.parts.models import originals
from lowmem.ui.parts.push import PushBox
from lowmem.ui.parts.runner import ButtonRunner, View, latest
from lowmem.ui.tabs.compare import CompareView
from lowmem.ui.tabs.explain import ExplainView
from lowmem.ui.tabs.quantize_form import QuantizeForm


class QuantizeTab:
    """Layout and wiring of the tab."""

    def __init__(self, context: Context) -> None:
        self.engine, self.service = context.engine, context.services.quantize
        self.receipt = gr.State(None)
        with gr.Tabs(elem_id="quantize-modes", elem_classes="lm-modes"):
            with gr.Tab(msg("Quantize"), id="make"):
                self._build(context)
            with gr.Tab(msg("Compare"), id="compare"):
                CompareView(context)
            with gr.Tab(msg("How it works"), id="explain"):
                ExplainView(context, self.form.model, self.receipt)
        Learn(context.engine, "quantize", self.form.model)
        self._wire(context)

    def _build(self, context: Context) -> None:
        with gr.Row(elem_id="quantize"):
            with gr.Column(scale=3, min_width=300):
                self.form = QuantizeForm(context)
            with gr.Column(scale=2, min_width=300, elem_id="quantize-side"):
                self.card = gr.HTML(elem_id="quantize-card")
                self.runner = ButtonRunner(context, "quantize", msg("Quantize"))
                self.problem = gr.HTML(elem_id="quantize-problem")  # of the choice
        with gr.Column(visible=False, elem_id="quantize-result") as self.result:
            self.table = gr.HTML(elem_id="quantize-receipt")
            with gr.Row(elem_classes="lm-actions"):
                self.load = gr.Button(
                    msg("Load into Generate"), variant="primary", scale=0, min_width=220, elem_id="quantize-load"
                )
            PushBox(context, self.receipt)

    def _wire(self, context: Context) -> None:
        form = self.form
        form.wire()
        outputs = (self.card, self.runner.button, self.problem)
        self.estimate = EstimateView(context, form.controls, outputs, self._estimate, self._measure)
        ran = self.runner.wire(form.controls, [self.result, self.table, self.receipt], self._start)
        ran.then(lambda: gr.Dropdown(originals(self.engine)), None, form.model, **QUICK)
        self.estimate.after(ran)
        context.load_result(self.load.click, self.receipt)

    def _estimate(self, *values: Any) -> tuple[str, bool, str]:
        expected = self.service.estimate(self.form.request(values))
        return render_quantize.card(expected), expected.verdict == "over", ""

    def _measure(self, *values: Any) -> None:
        with suppress(Exception):  # `_estimate` shows the error
            self.service.measure(self.form.request(values))

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        def show(made: Receipt) -> list[Any]:
            return [gr.Column(visible=True), render_quantize.receipt(made), made.as_dict()]

        nothing = [gr.Column(visible=False), "", None]
        return self.service.quantize(self.form.request(values), token), latest(Receipt, show, nothing)


TAB = Tab("quantize", msg("Quantize"), QuantizeTab)
