"""A button, its Stop, progress and notice around one generator of the engine: what every action of a page needs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lowmem.events import Receipt, Step
from lowmem.settings import settings
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import HEAVY, QUICK, Jobs, notice, pump, stops
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import Engine

View = Callable[[Sequence[Any]], list[Any]]
"""Takes the events that gathered, none at the end, and returns what the outputs become."""

Start = Callable[..., tuple[Iterator[Any], View]]
"""(token, *values of the inputs) -> the engine's events, begun lazily, and a view of them."""


class Runner:
    """Built where it stands in the layout; `kind` names its work and its elements."""

    def __init__(self, engine: Engine, jobs: Jobs, kind: str, label: str) -> None:
        self.engine, self.jobs, self.kind = engine, jobs, kind
        with gr.Row(elem_classes="lm-actions"):
            self.run = gr.Button(label, variant="primary", scale=0, min_width=200, elem_id=f"{kind}-start")
            self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id=f"{kind}-stop")
        self.progress = gr.HTML(elem_id=f"{kind}-progress")
        self.notice = gr.HTML(elem_id=f"{kind}-notice")

    def wire(
        self, sidebar: Sidebar, inputs: list[Any], outputs: list[Any], start: Start, also: Sequence[Any] = ()
    ) -> Any:
        """`also`: further events that start it. Returns the last event, to chain on."""
        self._start, self._count = start, len(outputs)
        own = [self.run, self.stop, self.progress, self.notice]
        begun = gr.on([self.run.click, *also], self._begin, None, own, **QUICK)
        stops(self.stop.click, self.jobs, self.kind, self.progress)
        return sidebar.after(begun.then(self._go, inputs, [*own, *outputs], **HEAVY))

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, self.kind)
        note = say("waiting", busy=self.engine.busy) if self.engine.busy else say("starting")
        return [gr.Button(interactive=False), gr.Button(visible=True), render.progress(Step(0, 0, note)), ""]

    def _go(self, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        trouble, view = "", None
        try:
            with self.jobs.running(request, self.kind) as token:
                events, view = self._start(token, *values)
                for gathered in pump(events, token):
                    steps = [event for event in gathered if isinstance(event, Step)]
                    others = [event for event in gathered if not isinstance(event, Step)]
                    for receipt in (event for event in others if isinstance(event, Receipt)):
                        self.engine.note(receipt)
                    moved = render.progress(steps[-1]) if steps else gr.skip()
                    if steps or others:
                        yield [gr.skip(), gr.skip(), moved, gr.skip(), *(view(others) if others else self._skips())]
        except Exception as error:
            trouble = notice(error)
        last = view([]) if view else self._skips()
        yield [gr.Button(interactive=True), gr.Button(visible=False), "", trouble, *last]

    def _skips(self) -> list[Any]:
        return [gr.skip()] * self._count


def new_folder(kind: str) -> Path:
    """A new folder for what an action writes, below `settings().outputs`."""
    folder = settings().outputs / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True)
    return folder
