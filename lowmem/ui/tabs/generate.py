"""The Generate tab: setup, then chat, completion and batch with their options."""

from __future__ import annotations

from typing import Any

import gradio as gr

from lowmem.fields import describe
from lowmem.generate.options import GenerateOptions
from lowmem.messages import Message, msg
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html, escape
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.fields import read, widgets
from lowmem.ui.parts.learn import Learn
from lowmem.ui.parts.setup import Setup
from lowmem.ui.parts.verify import VerifyBox
from lowmem.ui.tabs.batch import Batch
from lowmem.ui.tabs.chat import Chat
from lowmem.ui.tabs.completion import Completion

MAIN = ("max_new_tokens", "temperature", "top_p")
REST = tuple(option.name for option in describe(GenerateOptions) if option.name not in MAIN)
SAMPLING = tuple(option.name for option in describe(GenerateOptions) if option.from_model)
ESTIMATED = ("max_new_tokens", "num_return_sequences", "cache_type", "window", "sinks", "use_cache", "prefill_chunk")


class GenerateTab:
    """Layout and wiring of the tab; `shown` redraws what depends on the resident model."""

    def __init__(self, context: Context) -> None:
        self.context, self.engine, self.sidebar = context, context.engine, context.sidebar
        self.setup = Setup(context)
        with gr.Row(visible=False, elem_id="workbench") as self.workbench:
            with gr.Column(scale=3, min_width=300, elem_id="work"):
                self.template_note = gr.HTML(elem_id="template-note")
                with gr.Tabs(elem_id="modes") as modes:
                    with gr.Tab(msg("Chat"), id="chat"):
                        self.chat = Chat(context)
                    with gr.Tab(msg("Completion"), id="completion"):
                        self.completion = Completion(context)
                    with gr.Tab(msg("Batch"), id="batch"):
                        self.batch = Batch(context)
            with gr.Column(scale=1, min_width=250, elem_id="options"):
                self._build_options()
                VerifyBox(context)
        Learn(context.engine, "generate")
        modes.select(self._fit_options, None, self.system, **QUICK)
        self._wire()

    def _build_options(self) -> None:
        gr.HTML(Html(lambda: f"<h2>{escape(msg('Options'))}</h2>"))
        self.system = gr.Textbox(
            label=msg("System prompt"),
            placeholder=msg("Optional: how the model should behave"),
            lines=2,
            max_lines=6,
            elem_id="system",
        )
        controls = widgets(GenerateOptions, MAIN)
        with gr.Accordion(msg("More options"), open=False, elem_id="more-options"):
            controls |= widgets(GenerateOptions, REST)
        self.names, self.controls = tuple(controls), controls
        self.options = list(controls.values())

    def _fit_options(self, selected: gr.SelectData) -> Any:
        """Only a chat has a system prompt."""
        return gr.Textbox(visible=selected.index == 0)

    def _read(self, *values: Any) -> GenerateOptions:
        return read(GenerateOptions, self.names, values)

    def _wire(self) -> None:
        self.setup.wire(self.shown)
        self.chat.wire(self.system, self.options, self._read)
        self.completion.wire(self.options, self._read)
        self.batch.wire(self.options, self._read)
        self.shown(
            self.sidebar.on_unload([self.setup.unload], self.context.stop_tokens).then(
                lambda: False, None, self.setup.choosing, **QUICK
            )
        )
        self.shown(self.sidebar.loaded.change(lambda: None, None, None, **QUICK))
        if opened := self.context.opened:
            self.shown(opened).then(self.setup.refusals, None, self.setup.unavailable, **QUICK)
        for name in ESTIMATED:
            self.controls[name].change(
                self._estimate,
                [self.setup.choosing, *self.options],
                self.sidebar.budget,
                trigger_mode="always_last",
                **QUICK,
            )

    def shown(self, event: Any) -> Any:
        """After `event`, redraw for the resident model at that moment."""
        setup = self.setup
        sampling = [self.controls[name] for name in SAMPLING]
        outputs = [*setup.view_outputs, self.workbench, self.template_note, self.controls["cache_type"], *sampling]
        event = event.then(self._view, setup.choosing, outputs, **QUICK)
        event = event.then(setup.estimate, setup.controls, setup.estimate_outputs, **QUICK)
        return event.then(self._estimate, [setup.choosing, *self.options], self.sidebar.budget, **QUICK)

    def _view(self, choosing: bool) -> list[Any]:
        plan = self.engine.resident
        plain = plan is not None and not plan.spec.has_chat_template
        note = (
            parts.quiet(
                msg(
                    "{model} has no chat template, so messages are joined as plain text. Use Completion for better results.",
                    model=plan.spec.name,
                )
            )
            if plan and plain
            else ""
        )
        kv = gr.Dropdown(value=plan.cache_type) if plan else gr.skip()
        own = GenerateOptions().sampling(dict(plan.spec.sampling)) if plan else None
        sampling = [gr.Slider(value=getattr(own, name)) if own else gr.skip() for name in SAMPLING]
        return [*self.setup.view(choosing), gr.Row(visible=plan is not None and not choosing), note, kv, *sampling]

    def _estimate(self, choosing: bool, *values: Any) -> Any:
        """The budget bar for the next answer of the resident model; while choosing, the card's estimate stays."""
        resident = self.engine.resident
        if choosing or resident is None:
            return gr.skip()
        try:
            plan = self.engine.estimate(0, self._read(*values)) or resident
        except Exception:  # generation itself reports invalid options
            return gr.skip()
        return render.budget(
            plan, msg("For an answer of up to {tokens} tokens", tokens=Message("{context:,}", context=plan.context))
        )


TAB = Tab("generate", msg("Generate"), GenerateTab)
