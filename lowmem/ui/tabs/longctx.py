"""The Long Context tab: continue, chat about and measure texts longer than the cache may grow."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from lowmem.datasets import texts
from lowmem.datasets.long_text import MAX_CHARACTERS
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import check_window
from lowmem.messages import Message, msg
from lowmem.planning.cache import CACHE_TYPES
from lowmem.ui.html import longctx as render_longctx
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html, escape
from lowmem.ui.names import NAMES, name
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.fields import widgets
from lowmem.ui.parts.learn import Learn
from lowmem.ui.tabs.longctx_measuring import HiddenMode, PerplexityMode, RecallMode, StrategiesMode
from lowmem.ui.tabs.longctx_writing import ChatMode, ContinueMode

OPTIONS = ("sinks", "temperature", "repetition_penalty")
CHARACTERS_PER_TOKEN = 4  # of English; only for the estimate that follows the sliders
# In older gradio, as on Colab, tabs that are too wide fold into a menu.
WRAPPED: dict[str, Any] = (
    {"overflow_behavior": "wrap"} if "overflow_behavior" in inspect.signature(gr.Tabs).parameters else {}
)
DEFAULT_WINDOW, DEFAULT_STRIDE, LARGEST_SLIDER = 1024, 512, 8192


class LongContextTab:
    """Layout and wiring of the tab."""

    def __init__(self, context: Context) -> None:
        self.engine, self.sidebar = context.engine, context.sidebar
        with gr.Row(elem_id="longctx"):
            with gr.Column(scale=3, min_width=300, elem_id="longctx-work"):
                self._build_source()
                self.modes = self._build_modes(context)
            with gr.Column(scale=1, min_width=250, elem_id="longctx-side"):
                self._build_options()
        with gr.Accordion(msg("What stays cached and what is evicted"), open=False, elem_id="longctx-explain"):
            gr.HTML(parts.explanations(NAMES["long_how"]))
        for mode in self.modes:
            mode.wire(self)
        Learn(context.engine, "longctx")
        self._wire(context)

    def _build_source(self) -> None:
        self.text = gr.Textbox(
            label=msg("A long text"),
            placeholder=msg("Paste a text of any length, or choose one below."),
            lines=6,
            max_lines=10,
            max_length=MAX_CHARACTERS + 1,  # a browser cuts off in silence; this is refused with the bound
            elem_id="long-text",
        )
        with gr.Row(elem_id="long-source"):
            self.address = gr.Dropdown(
                [(msg("The text above"), ""), *((name("texts", key), key) for key in texts.NAMES)],
                value="",
                allow_custom_value=True,
                label=msg("Or another text"),
                info=msg("Choose an included text or enter an address (https://...)."),
                elem_id="long-address",
                min_width=260,
            )
            self.file = gr.File(
                label=msg("Or a text file, up to 2 MB"), file_types=["text"], height=132, elem_id="long-file"
            )

    def _build_modes(self, context: Context) -> list[Any]:
        kinds = (ContinueMode, ChatMode, PerplexityMode, HiddenMode, RecallMode, StrategiesMode)
        with gr.Tabs(elem_id="longctx-modes", elem_classes="lm-modes", **WRAPPED):
            made = []
            for kind in kinds:
                with gr.Tab(name("long", kind.key), id=kind.key):
                    made.append(kind(context))
        return made

    def _build_options(self) -> None:
        gr.HTML(Html(lambda: f"<h2>{escape(msg('Options'))}</h2>"))
        self.memory = gr.HTML(elem_id="long-memory")
        labels: dict[str, Any] = {"buttons": []}
        self.window = gr.Slider(
            0, LARGEST_SLIDER, value=DEFAULT_WINDOW, step=64, label=msg("Window"), info=msg("Latest tokens that stay cached. 0 = all, up to the model's context."),
            elem_id="long-window", **labels,
        )  # fmt: skip
        controls = widgets(GenerateOptions, OPTIONS, "long")
        self.kv = gr.Dropdown(
            [(name("choices", key), key) for key in CACHE_TYPES],
            value="same",
            label=msg("KV cache type"),
            info=msg("Fewer bits take less memory per cached token."),
            filterable=False,
            elem_id="long-kv",
        )
        self.stride = gr.Slider(
            1, LARGEST_SLIDER, value=DEFAULT_STRIDE, step=1, label=msg("Stride"), info=msg("For perplexity in windows and hidden states: tokens by which the window advances."),
            elem_id="long-stride", **labels,
        )  # fmt: skip
        self.names = ("window", *OPTIONS, "cache_type")
        self.options = [self.window, *controls.values(), self.kv]

    def _wire(self, context: Context) -> None:
        inputs = [self.text, self.file, *self.options]
        outputs = [self.memory, self.sidebar.budget]
        for control in (self.window, self.kv, self.options[1], self.text, self.file):
            control.change(self._estimate, inputs, outputs, trigger_mode="always_last", **QUICK)
        self.file.upload(lambda: "", None, self.address, **QUICK)
        context.when_opened(self._card, inputs, self.memory, **QUICK)
        context.sidebar.loaded.change(self._card, inputs, self.memory, **QUICK)

    @property
    def source(self) -> list[Any]:
        """The controls that say where the text is."""
        return [self.text, self.file, self.address]

    def read(self, *values: Any) -> GenerateOptions:
        """The options' values for unbounded generation, for visitors up to their limit.

        Raises:
            BadInput: a value outside its range, named.
        """
        options = build(GenerateOptions, dict(zip(self.names, values, strict=True)))
        return replace(options, max_new_tokens=self.engine.access.longest, unbounded=True)

    def _card(self, text: str, file: str | None, *values: Any) -> Any:
        plan = self.engine.resident
        if plan is None:
            return render_longctx.memory(None, None, 0)
        size = Path(file).stat().st_size if file else len(text or "")
        tokens = max(plan.spec.context, size // CHARACTERS_PER_TOKEN)
        try:
            options = self.read(*values)
            check_window(options, plan.spec.context)
            estimate = self.engine.estimate(tokens, options)
            whole = self.engine.estimate_whole(tokens)
        except Exception as error:
            return notice(error, toast=False)
        return render_longctx.memory(estimate, whole, tokens)

    def _estimate(self, text: str, file: str | None, *values: Any) -> list[Any]:
        card = self._card(text, file, *values)
        try:
            plan = self.engine.estimate(0, self.read(*values))
        except Exception:
            plan = None
        if plan is None:
            return [card, gr.skip()]
        tokens = Message("{cached_tokens:,}", cached_tokens=plan.cached_tokens)
        return [card, render.budget(plan, msg("For an answer of up to {tokens} tokens", tokens=tokens))]


TAB = Tab("longctx", msg("Long Context"), LongContextTab)
