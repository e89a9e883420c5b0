"""The Quantize tab: make a smaller checkpoint, put variants side by side, see how it works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from lowmem.events import Receipt, Step
from lowmem.ui import render, render_quantize
from lowmem.ui.bind import HEAVY, QUICK, Jobs, notice, pump, stops
from lowmem.ui.compare import CompareView
from lowmem.ui.engine import AUTO
from lowmem.ui.explain import ExplainView
from lowmem.ui.push import PushBox
from lowmem.ui.quantize_form import QuantizeForm, originals
from lowmem.ui.setup import Setup
from lowmem.ui.sidebar import Sidebar
from lowmem.ui.strings import say
from lowmem.ui.workshop import Workshop

KIND = "quantize"


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
                with gr.Row(elem_classes="lm-actions"):
                    self.start = gr.Button(say("start_quantize"), variant="primary", elem_id="quantize-start")
                    self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id="quantize-stop")
                self.progress = gr.HTML(elem_id="quantize-progress")
                self.problem = gr.HTML(elem_id="quantize-problem")  # of the choice
                self.notice = gr.HTML(elem_id="quantize-notice")  # of the last run
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
        priced = [self.card, self.start, self.problem]
        for control in form.controls:
            control.change(self._price, form.controls, priced, trigger_mode="always_last", **QUICK)
        outputs = [self.start, self.stop, self.progress, self.notice, self.result, self.table, self.receipt]
        started = self.start.click(self._begin, None, outputs[:5], **QUICK)
        ran = started.then(self._run, form.controls, outputs, **HEAVY)
        ran.then(self._models, None, form.model, **QUICK)
        self.sidebar.after(ran)
        ran.then(self._price, form.controls, priced, **QUICK)
        stops(self.stop.click, self.jobs, KIND, self.progress)
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
        return event.then(self._price, self.form.controls, [self.card, self.start, self.problem], **QUICK)

    def _models(self) -> Any:
        return gr.Dropdown(originals(self.workshop))

    def _price(self, *values: Any) -> list[Any]:
        try:
            expected = self.workshop.forecast(self.form.ask(values))
        except Exception as error:
            return ["", gr.Button(interactive=False), notice(error, toast=False)]
        return [render_quantize.card(expected), gr.Button(interactive=expected.verdict != "over"), ""]

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        busy = self.workshop.engine.busy
        note = say("waiting", busy=busy) if busy else say("starting")
        return [
            gr.Button(interactive=False),
            gr.Button(visible=True),
            render.progress(Step(0, 0, note)),
            "",
            gr.Column(visible=False),
        ]

    def _run(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        trouble, receipt = "", None
        try:
            with self.jobs.running(request, KIND) as token:
                for events in pump(self.workshop.quantize(self.form.ask(values), token), token):
                    steps = [event for event in events if isinstance(event, Step)]
                    receipt = next((event for event in events if isinstance(event, Receipt)), receipt)
                    if steps:
                        yield [*[gr.skip()] * 2, render_quantize.progress(steps[-1]), *[gr.skip()] * 4]
        except Exception as error:
            trouble = notice(error)
        table = render_quantize.receipt(receipt) if receipt else ""
        kept = receipt.as_dict() if receipt else None
        yield [
            gr.Button(interactive=True),
            gr.Button(visible=False),
            "",
            trouble,
            gr.Column(visible=receipt is not None),
            table,
            kept,
        ]

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
