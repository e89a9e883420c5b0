"""The setup: the recommendation, other choices, and loading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lowmem.events import CancelToken
from lowmem.fields import build
from lowmem.messages import Message, msg
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.plan import Plan
from lowmem.ui.html import plan as render
from lowmem.ui.names import name
from lowmem.ui.parts.another_machine import AnotherMachine
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.models import model_dropdown, with_automatic
from lowmem.ui.parts.runner import Runner, View
from lowmem.ui.parts.storage import Storage
from lowmem.ui.service.engine import AUTO, Choice, precision_label
from lowmem.ui.service.results import result_folder

FOCUS = "() => { setTimeout(() => document.querySelector('#message textarea')?.focus(), 150); }"


class Setup:
    """The card, its controls, and the slim bar it collapses into.

    Attributes:
        panel, bar: the card's column and the slim bar; one of them is visible.
        choosing: State, True while another model is being chosen beside a resident one.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.engine, self.sidebar = context, context.engine, context.sidebar
        self.choosing = gr.State(False)
        with gr.Row(visible=False, elem_id="resident-bar") as self.bar:
            self.slim = gr.HTML(elem_id="slim")
            self.change = gr.Button(msg("Change model"), size="sm", min_width=120, scale=0, elem_id="change-model")
            self.unload = gr.Button(msg("Unload"), size="sm", min_width=84, scale=0, elem_id="unload-bar")
        with gr.Column(elem_id="setup") as self.panel:
            with gr.Column(visible=False, elem_id="lost") as self.lost_box:
                self.lost = gr.HTML()
                with gr.Row():
                    self.load_less = gr.Button(
                        msg("Load it with less memory"), variant="primary", elem_id="load-less", scale=0, min_width=260
                    )
            with gr.Column(elem_id="offer"):
                self.card = gr.HTML('<section class="lm-card lm-skeleton"></section>', elem_id="card")
                with gr.Row(elem_id="load-row"):
                    self.load = gr.Button(
                        msg("Finding what fits"), variant="primary", size="lg", interactive=False, elem_id="load"
                    )
                    self.anyway = gr.Button(
                        msg("Try anyway"), size="lg", visible=False, scale=0, min_width=140, elem_id="anyway"
                    )
                self.problem = gr.HTML(elem_id="setup-problem")  # of the choice; goes when it changes
                self.runner = self._build_runner(context)
            self.back = gr.Button(msg("Back to the resident model"), size="sm", visible=False, elem_id="back")
            self._build_controls(context.model)
            with gr.Accordion(
                msg("Alternatives considered ({count})", count=0), open=False, elem_id="declined"
            ) as self.declined_box:
                self.declined = gr.HTML()
            AnotherMachine(context)
            self.storage = Storage(context)

    def _build_runner(self, context: Context) -> Runner:
        with gr.Row(elem_id="load-progress", visible=False) as row:
            progress = gr.HTML()
            stop = gr.Button(msg("Stop"), size="sm", scale=0, min_width=80, elem_id="stop-load")
        off, on = gr.update(interactive=False), gr.update(interactive=True)
        return Runner(
            context,
            "load",
            running={self.load: off, self.anyway: off, row: gr.update(visible=True)},
            idle={self.load: on, self.anyway: on, row: gr.update(visible=False)},
            stop=stop.click,
            progress=progress,
            notice=gr.HTML(elem_id="setup-notice"),  # of the last loading
        )

    def _build_controls(self, model: str) -> None:
        hardware = self.engine.hardware()
        devices = [(msg("Automatic"), AUTO), *((device.name, device.key) for device in (*hardware.gpus, hardware.cpu))]
        with gr.Accordion(msg("Choose another model or setting"), open=model != AUTO, elem_id="choose"):
            with gr.Row():
                self.model = model_dropdown(with_automatic(self.engine, model), "model", model, min_width=260)
                self.precision = gr.Dropdown(
                    self._precisions(AUTO),
                    value=AUTO,
                    filterable=False,
                    label=msg("Precision"),
                    info=msg("Fewer bits, less memory."),
                    elem_id="precision",
                    min_width=260,
                )
            self.context_size = gr.Slider(
                256,
                8192,
                value=2048,
                step=256,
                label=msg("Context"),
                info=msg(
                    "Tokens of prompt and answer together, for the estimate. A longer conversation is estimated again."
                ),
                elem_id="context",
            )
            with gr.Row():
                self.device = gr.Dropdown(
                    devices,
                    value=AUTO,
                    filterable=False,
                    label=msg("Runs on"),
                    info=msg("The device that runs the model."),
                    elem_id="device",
                    visible=bool(hardware.gpus),
                    min_width=260,
                )
                self.cache_type = gr.Dropdown(
                    [(name("choices", key), key) for key in CACHE_TYPES],
                    value="same",
                    filterable=False,
                    label=msg("KV cache type"),
                    info=msg("int8 takes half or a quarter of the memory, at a small loss of precision."),
                    elem_id="kv",
                    min_width=260,
                )
            self.unavailable = gr.HTML(elem_id="unavailable")
        self.controls: list[Any] = [
            self.model,
            self.precision,
            self.context_size,
            self.device,
            self.cache_type,
            *self.sidebar.limits,
        ]

    def _precisions(self, device: str) -> list[tuple[str, str]]:
        refused = self.engine.precisions(device)
        return [(precision_label(key), key) for key in (AUTO, *refused) if refused.get(key) is None]

    # --- estimates

    def wire(self, page_shown: Any) -> None:
        """Connect the controls. `page_shown` is called to redraw after the resident model changed."""
        self.estimate_outputs = outputs = [
            self.card,
            self.load,
            self.anyway,
            self.declined_box,
            self.declined,
            self.sidebar.budget,
            self.problem,
        ]
        for control in self.controls:
            control.change(self.estimate, self.controls, outputs, trigger_mode="always_last", **QUICK)
        self.model.change(self.fit_context, [self.model, self.context_size], self.context_size, **QUICK)
        self.device.change(
            self._fit_precision, [self.device, self.precision], [self.precision, self.unavailable], **QUICK
        )
        self.storage.wire(self.model)
        self._page_shown = page_shown
        self.runner.wire(self.controls, [], self._start)
        self.load_on(self.load.click)
        self.load_on(self.anyway.click, force=True)
        self.load_on(self.load_less.click, fallback=True)
        self.context.load_result = self.load_result
        page_shown(self.change.click(lambda: True, None, self.choosing, **QUICK))
        page_shown(self.back.click(lambda: False, None, self.choosing, **QUICK)).then(None, js=FOCUS, **QUICK)

    def load_on(self, trigger: Any, *, force: bool = False, fallback: bool = False) -> None:
        """Load what the controls say whenever `trigger` fires: a button's `click`, or the `then` of another event.

        Args:
            fallback: load the fallback of a model whose process died instead.
        """

        def start(token: CancelToken, *values: Any) -> tuple[Iterator[Any], View]:
            lost = self.engine.lost
            if fallback and lost is not None and lost.fallback is not None:
                return self.engine.load(lost.fallback, token), lambda _: []
            return self._start(token, *values, force=force)

        redrawn = self._page_shown(
            self.runner.on(trigger, start=start).then(lambda: False, None, self.choosing, **QUICK)
        )
        redrawn.then(None, js=FOCUS, **QUICK)

    def load_result(self, trigger: Any, receipt: gr.State) -> None:
        """Load the result whose receipt is in `receipt` whenever `trigger` fires, and show it."""
        chosen = trigger(
            self._choose,
            [receipt, self.context_size],
            [self.context.tabs, self.model, self.precision, self.device, self.context_size],
            **QUICK,
        )
        self.load_on(chosen.then)

    def _choose(self, receipt: dict[str, Any], context: float) -> list[Any]:
        folder = str(result_folder(self.engine.access, receipt["details"]["folder"]))
        dropdown = gr.Dropdown(with_automatic(self.engine, folder, Path(folder).name), value=folder)
        return [gr.Tabs(selected="generate"), dropdown, AUTO, AUTO, self.fit_context(folder, context)]

    def choice(self, values: tuple[Any, ...]) -> Choice:
        model, precision, context, device, cache_type, *limits = values
        values_by_name = {
            "model": (model or AUTO).strip(),
            "precision": precision,
            "context": context,
            "device": device,
            "cache_type": cache_type,
        }
        return replace(build(Choice, values_by_name), budget=self.sidebar.budget_of(limits))

    def estimate(self, *values: Any) -> list[Any]:
        """Card, buttons and budget bar for the controls as they stand."""
        try:
            choice = self.choice(values)
            return [
                *self._estimated(self.engine.plan(choice), recommended=choice.model == AUTO == choice.precision),
                "",
            ]
        except Exception as error:
            blocked = [
                gr.Button(msg("No model to load"), interactive=False),
                gr.Button(visible=False),
                gr.Accordion(visible=False),
            ]
            return [render.unknown_card(str(values[0])), *blocked, "", "", notice(error, toast=False)]

    def _estimated(self, plan: Plan, *, recommended: bool) -> list[Any]:
        hardware = self.engine.hardware()
        over = plan.verdict == "over"
        label = (
            msg("Doesn't fit")
            if over
            else msg("Load {model} in {precision} and chat", model=plan.spec.name, precision=plan.precision)
        )
        card = render.setup_card(
            plan,
            recommended=recommended,
            download=self.engine.download_bytes(plan.spec),
            disk_free=hardware.disk_free_bytes,
        )
        declined = [(item.choice, item.reason) for item in plan.declined]
        return [
            card,
            gr.Button(label, interactive=not over),
            gr.Button(visible=over and self.engine.access.owned, interactive=True),
            gr.Accordion(msg("Alternatives considered ({count})", count=len(declined)), visible=bool(declined)),
            render.refusals(declined),
            render.budget(
                plan,
                Message(
                    "{model} · {precision} · {context:,} tokens",
                    model=plan.spec.name,
                    precision=plan.precision,
                    context=plan.context,
                ),
            ),
        ]

    def fit_context(self, model: str, context: float) -> Any:
        """The context slider as far as `model` goes."""
        try:
            longest = 8192 if model in ("", AUTO) else self.engine.spec(model).context
        except Exception:  # `estimate` shows the error
            return gr.skip()
        top = max(256, longest // 256 * 256)
        return gr.Slider(maximum=top, value=min(context, top))

    def _fit_precision(self, device: str, precision: str) -> list[Any]:
        choices = self._precisions(device)
        value = precision if precision in [key for _, key in choices] else AUTO
        return [gr.Dropdown(choices, value=value), self.refusals(device)]

    def refusals(self, device: str = AUTO) -> str:
        """The precisions that do not run here, each with its reason."""
        refused = [(precision_label(key), why) for key, why in self.engine.precisions(device).items() if why]
        return render.refusals(refused, msg("Not on this machine"))

    def _start(self, token: CancelToken, *values: Any, force: bool = False) -> tuple[Iterator[Any], View]:
        def events() -> Iterator[Any]:
            yield from self.engine.load(self.engine.plan(self.choice(values)), token, force=force)

        return events(), lambda _: []

    # --- visibility

    @property
    def view_outputs(self) -> list[Any]:
        return [self.bar, self.slim, self.panel, self.back, self.lost_box, self.lost, self.load_less]

    def view(self, choosing: bool) -> list[Any]:
        """Card or slim bar, for the resident model at this moment."""
        plan = self.engine.resident
        open_card = plan is None or choosing
        slim = render.slim(plan, self.engine.load_receipt) if plan else ""
        return [
            gr.Row(visible=not open_card),
            slim,
            gr.Column(visible=open_card),
            gr.Button(visible=plan is not None),
            *self._view_lost(),
        ]

    def _view_lost(self) -> list[Any]:
        lost = self.engine.lost
        if lost is None:
            return [gr.Column(visible=False), "", gr.Button(visible=False)]
        lower = lost.fallback
        sentence = msg("{model} was unloaded. {sentence}", model=lost.plan.spec.name, sentence=lost.sentence)
        if lower is None:
            return [gr.Column(visible=True), render.lost(sentence, ""), gr.Button(visible=False)]
        return [gr.Column(visible=True), render.lost(sentence, lower.reason), gr.Button(visible=True)]
