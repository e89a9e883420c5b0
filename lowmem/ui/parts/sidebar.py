"""The machine beside every tab: budget sliders, the estimate, meters, resident model, receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from lowmem.errors import NotAllowed
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg, translate
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html
from lowmem.ui.names import name
from lowmem.ui.parts.event_settings import HEAVY, QUICK
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.engine import Engine
from lowmem.units import GB

TICK_SECONDS = 2.0
PRESETS_GB = (1, 2, 4, 6, 12)
ZEROGPU_PRESETS_GB = (4, 6, 8, 12, 16)  # the sizes of cards that its 48 GB stand in for
Seen = tuple[str, str]


class Sidebar:
    """Created first, in the current layout.

    Args:
        engine: the state to show.
        cap_bytes: a budget that the command line set for the computing device, or None.

    Attributes:
        limits: the budget sliders, RAM first, in GB.
        budget: the budget bar; written with every new estimate.
        loaded: the loaded model's key, in a hidden textbox: its `change` fires on every page when one loads or unloads.
            (A `gr.State` would stay silent, as gradio reports its changes only for queued events.)
    """

    def __init__(self, engine: Engine, cap_bytes: int | None = None) -> None:
        self.engine = engine
        hardware = engine.hardware()
        with gr.Sidebar(width=352, elem_id="sidebar"):
            self.machine = gr.HTML(Html(lambda: render.machine(hardware.line())))
            self.budget = gr.HTML(elem_id="budget")
            self._build_sliders(hardware, cap_bytes)
            self.meters = gr.HTML(elem_id="meters")
            self.resident = gr.HTML(Html(lambda: render.resident(None, "")), elem_id="resident")
            self.unload = gr.Button(msg("Unload"), size="sm", visible=False, elem_id="unload")
            self.receipt = gr.HTML(Html(lambda: render.receipt(None)), elem_id="receipt")
            with gr.Accordion(
                msg("Repeat in Python"), open=False, visible=False, elem_id="snippet"
            ) as self.snippet_box:
                self.snippet = gr.Code(
                    language="python",
                    show_label=False,
                    interactive=False,
                    show_line_numbers=False,
                    wrap_lines=True,
                    buttons=["copy"],
                )
        self.seen = gr.State(("", ""))  # the resident model and the receipt as last shown
        self.loaded = gr.Textbox(visible="hidden", elem_id="loaded")
        self.outputs = [
            self.meters,
            self.resident,
            self.unload,
            self.receipt,
            self.snippet_box,
            self.snippet,
            self.seen,
            self.loaded,
        ]
        gr.Timer(TICK_SECONDS).tick(self.refresh, self.seen, self.outputs, **QUICK)

    def _build_sliders(self, hardware: Hardware, cap_bytes: int | None) -> None:
        most = {memory: limit / GB for memory, limit in self.engine.bounded(UNLIMITED).as_dict().items()}
        main = "vram" if "vram" in most else "ram"
        sizes = ZEROGPU_PRESETS_GB if hardware.host == "zerogpu" else PRESETS_GB
        presets = [size for size in sizes if size < most[main]]
        preset = 0 if cap_bytes is None else next((size for size in presets if size * GB == cap_bytes), None)
        pretend = gr.Radio(
            [(f"{size} GB", size) for size in presets] + [(msg("All"), 0)],
            value=preset,
            label=msg("Simulate a machine with"),
            elem_id="pretend",
        )
        sliders = {}
        for memory, gigabytes in most.items():
            top = max(0.2, int(gigabytes * 10) / 10)
            value = min(top, cap_bytes / GB) if cap_bytes and memory == main else top
            sliders[memory] = gr.Slider(
                0.1, top, value=value, step=0.1, label=name("slider", memory), elem_id=f"{memory}-budget", buttons=[]
            )
        self._top = {memory: slider.maximum for memory, slider in sliders.items()}
        self.limits = list(sliders.values())
        top = self._top[main]
        pretended = pretend.input(lambda size: size or top, pretend, sliders[main], **QUICK)
        # The preset at the value of the slider, none in between, so that each can be clicked again.
        preset_of = {float(size): size for size in presets} | {float(top): 0}
        sliders[main].input(preset_of.get, sliders[main], pretend, **QUICK)
        gr.on([slider.release for slider in self.limits], self._move_budget, self.limits, None, **QUICK)
        pretended.then(self._move_budget, self.limits, None, **QUICK)

    def budget_of(self, values: Sequence[float]) -> MemoryBudget:
        """What the sliders say; a slider at its end sets no limit."""
        pairs = zip(self._top.items(), values, strict=False)
        return MemoryBudget(**{memory: round(value * GB) for (memory, top), value in pairs if value < top})

    def _move_budget(self, *values: float) -> None:
        self.engine.set_budget(self.budget_of(values))

    def refresh(self, seen: Seen) -> list[Any]:
        """Meters always; resident model and receipt only when they changed: each tick costs the browser."""
        engine = self.engine
        plan, receipt, busy = engine.resident, engine.last_receipt, engine.busy
        now = (f"{resident_key(engine)} {busy}", f"{receipt.action} {receipt.seconds}" if receipt else "")
        meters = render.meters(engine.snapshot())
        if now == tuple(seen):
            return [meters, *[gr.skip()] * 7]
        snippet = receipt.snippet if receipt else ""
        resident = [render.resident(plan, busy), gr.Button(visible=plan is not None)]
        shown = [render.receipt(receipt), gr.Accordion(visible=bool(snippet)), snippet]
        return [meters, *resident, *shown, now, resident_key(engine)]

    def after(self, event: Any) -> Any:
        """Show what an action cost as soon as it ends."""
        return event.then(self.refresh, self.seen, self.outputs, **QUICK)

    def on_unload(self, buttons: list[gr.Button], stop_tokens: StopTokens) -> Any:
        """Unload from any of the buttons, ending this page's work first; returns the last event, to chain on."""
        triggers = [button.click for button in (self.unload, *buttons)]
        ended = gr.on(triggers, stop_tokens.leave, **QUICK)
        return self.after(ended.then(self._unload, **HEAVY))

    def _unload(self) -> None:
        try:
            self.engine.unload()
        except NotAllowed as error:  # the queue is full
            gr.Warning(translate(error.message))


def resident_key(engine: Engine) -> str:
    """Names the resident plan, "" for none."""
    plan = engine.resident
    return f"{engine.resident_ref} {plan.precision} {plan.device} {plan.context} {plan.cache_type}" if plan else ""
