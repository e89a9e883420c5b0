"""The Quantize tab: make a smaller checkpoint, put variants side by side, see how it works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.ui.html import quantize as render_quantize
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import QUICK, Jobs, notice
from lowmem.ui.parts.push import PushBox
from lowmem.ui.parts.runner import Runner, View
from lowmem.ui.parts.setup import Setup
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import AUTO
from lowmem.ui.service.quantizing import Workshop
from lowmem.ui.tabs.compare import CompareView
from lowmem.ui.tabs.explain import ExplainView
from lowmem.ui.tabs.quantize_form import QuantizeForm, originals


class QuantizeTab:
    """Layout and wiring of the tab.

    Args:
        tabs, setup: where a result is loaded.
    """

    def __init__(self, workshop: Workshop, jobs: Jobs, sidebar: Sidebar, tabs: gr.Tabs, setup: Setup) -> None:
        self.workshop, self.jobs, self.sidebar = workshop, jobs, sidebar
        with gr.Tabs(elem_id="quantize-modes", elem_classes="lm-modes"):
            with gr.Tab(say("quantize"), id="make"):
                self._build()
            with gr.Tab(say("compare"), id="compare"):
                CompareView(workshop, jobs, sidebar)
            with gr.Tab(say("explain"), id="explain"):
                ExplainView(workshop, jobs, self.form.model, self.receipt)
        self._wire(tabs, setup)

    def _build(self) -> None:
        self.receipt = gr.State(None)
        with gr.Row(elem_id="quantize"):
            with gr.Column(scale=3, min_width=300):
                self.form = QuantizeForm(self.workshop, self.sidebar)
            with gr.Column(scale=2, min_width=300, elem_id="quantize-side"):
                self.card = gr.HTML(elem_id="quantize-card")
                self.runner = Runner(self.workshop.engine, self.jobs, "quantize", say("start_quantize"))
                self.problem = gr.HTML(elem_id="quantize-problem")  # of the choice
        with gr.Column(visible=False, elem_id="quantize-result") as self.result:
            self.table = gr.HTML(elem_id="quantize-receipt")
            with gr.Row(elem_classes="lm-actions"):
                self.load = gr.Button(
                    say("load_result"), variant="primary", scale=0, min_width=220, elem_id="quantize-load"
                )
            self.push = PushBox(self.workshop, self.jobs)

    def _wire(self, tabs: gr.Tabs, setup: Setup) -> None:
        form = self.form
        form.wire()
        self.priced = [self.card, self.runner.run, self.problem]
        for control in form.controls:
            control.change(self._price, form.controls, self.priced, trigger_mode="always_last", **QUICK)
        outputs = [self.result, self.table, self.receipt]
        ran = self.runner.wire(self.sidebar, form.controls, outputs, self._start)
        ran.then(self._models, None, form.model, **QUICK)
        ran.then(self._price, form.controls, self.priced, **QUICK)
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
        return event.then(self._price, self.form.controls, self.priced, **QUICK)

    def _models(self) -> Any:
        return gr.Dropdown(originals(self.workshop))

    def _price(self, *values: Any) -> list[Any]:
        try:
            expected = self.workshop.estimate(self.form.request(values))
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False)]
        return [render_quantize.card(expected), gr.Button(interactive=expected.verdict != "over"), ""]

    def _start(self, token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
        made: list[Receipt] = []

        def view(gathered: Sequence[Any]) -> list[Any]:
            made.extend(event for event in gathered if isinstance(event, Receipt))
            if not made:
                return [gr.Column(visible=False), "", None]
            return [gr.Column(visible=True), render_quantize.receipt(made[-1]), made[-1].as_dict()]

        return self.workshop.quantize(self.form.request(values), token), view

    def _choose(self, receipt: dict[str, Any], context: float) -> list[Any]:
        folder = receipt["details"]["folder"]
        models = [(say("automatic"), AUTO), *self.workshop.engine.catalog()]
        if folder not in [ref for _, ref in models]:
            models.append((folder.rpartition("/")[2], folder))
        return [
            gr.Tabs(selected="generate"),
            gr.Dropdown(models, value=folder),
            AUTO,
            AUTO,
            self._fit_context(folder, context),
        ]
