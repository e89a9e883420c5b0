"""Long work behind a button: its queue, Stop, progress and notice, the same for every action of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import Step
from lowmem.messages import msg
from lowmem.ui.html import plan as render
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import HEAVY, QUICK
from lowmem.ui.parts.failures import notice
from lowmem.ui.parts.worker import pump, stops

Updates = dict[Any, Any]
"""Component -> its update."""

View = Callable[[Sequence[Any]], list[Any]]
"""Takes the latest events, none at the end, and returns the updates of the outputs."""

Start = Callable[..., tuple[Iterator[Any], View] | None]
"""(token, *values of the inputs) -> the events, begun lazily, and a view of them; None if there is nothing to do."""


def latest(kind: type, show: Callable[[Any], list[Any]], before: list[Any]) -> View:
    """A view of the latest event of `kind`: what `show` makes of it, `before` until there is one."""
    outputs = before

    def view(gathered: Sequence[Any]) -> list[Any]:
        nonlocal outputs
        for event in gathered:
            if isinstance(event, kind):
                outputs = show(event)
        return outputs

    return view


class Runner:
    """Runs one kind of work on existing components.

    Args:
        kind: names the work to `StopTokens`.
        running, idle: what buttons become while it runs, and afterwards.
        stop: the event that stops it.
        progress, notice: where steps and failures are shown. A view whose outputs include `progress` draws it itself.
        starting: the sentence before the first step.
        queue: event settings of the work.
    """

    def __init__(
        self,
        context: Context,
        kind: str,
        *,
        running: Updates,
        idle: Updates,
        stop: Any,
        progress: gr.HTML,
        notice: gr.HTML,
        starting: str = msg("Starting the engine"),
        queue: dict[str, Any] = HEAVY,
    ) -> None:
        self.engine, self.stop_tokens, self.sidebar = context.engine, context.stop_tokens, context.sidebar
        self.kind, self.running, self.idle = kind, running, idle
        self.progress, self.notice, self.starting, self.queue = progress, notice, starting, queue
        stops(stop, self.stop_tokens, kind, progress)

    def wire(self, inputs: list[Any], outputs: list[Any], start: Start) -> None:
        """Say what is run, before the first `on`."""
        self.inputs, self.outputs, self.start = inputs, outputs, start

    def on(
        self,
        trigger: Any,
        *,
        start: Start | None = None,
        begin: Callable[..., list[Any] | None] = lambda: [],
        begin_inputs: list[Any] | None = None,
    ) -> Any:
        """Run whenever `trigger` fires: a button's `click`, or the `then` of another event.

        Args:
            start: in place of the usual one.
            begin: (*values of `begin_inputs`) -> what the outputs become at once; None if there is nothing to do.

        Returns:
            The last event, to chain on.
        """

        def prepare(request: gr.Request, *values: Any) -> Updates:
            return self._prepared(request, begin(*values))

        def run(request: gr.Request, *values: Any) -> Iterator[Updates]:
            yield from self._run(request, start or self.start, values)

        everything = list(dict.fromkeys([*self.idle, self.progress, self.notice, *self.outputs]))
        begun = trigger(prepare, begin_inputs, everything, **QUICK)
        return self.sidebar.after(begun.then(run, self.inputs, everything, **self.queue))

    def _prepared(self, request: gr.Request, outputs: list[Any] | None) -> Updates:
        if outputs is None:
            return {self.notice: ""}
        self.stop_tokens.begin(request, self.kind)
        busy = self.engine.busy if self.queue is HEAVY else ""
        waiting = Step(0, 0, msg("Waiting: {busy}", busy=busy) if busy else self.starting)
        own = {**self.running, self.progress: render.progress(waiting), self.notice: ""}
        return own | {one: value for one, value in zip(self.outputs, outputs, strict=False) if one not in own}

    def _run(self, request: gr.Request, start: Start, values: Sequence[Any]) -> Iterator[Updates]:
        trouble, view = "", None
        try:
            with self.stop_tokens.running(request, self.kind) as token:
                started = start(token, *values)
                if started is None:
                    return
                events, view = started
                if self.queue is HEAVY:
                    events = self.engine.in_turn(events, token)
                for gathered in pump(events, token):
                    if updates := self._updates(gathered, view):
                        yield updates
        except Exception as error:
            trouble = notice(error)
        last = dict(zip(self.outputs, view([]), strict=True)) if view else {}
        yield {**self.idle, self.progress: "", self.notice: "", **last, **({self.notice: trouble} if trouble else {})}

    def _updates(self, gathered: Sequence[Any], view: View) -> Updates:
        steps = [event for event in gathered if isinstance(event, Step)]
        others = [event for event in gathered if not isinstance(event, Step)]
        updates: Updates = {self.progress: render.progress(steps[-1])} if steps else {}
        seen = gathered if self.progress in self.outputs else others
        return updates | dict(zip(self.outputs, view(seen), strict=True)) if seen else updates


class ButtonRunner(Runner):
    """A Runner with its own button, Stop, progress and notice, created in the current layout."""

    def __init__(
        self, context: Context, kind: str, label: str, *, starting: str = msg("Starting the engine"), queue: dict[str, Any] = HEAVY,
        **style: Any,
    ) -> None:  # fmt: skip
        style = {"variant": "primary", "min_width": 200, "elem_id": f"{kind}-start", **style}
        with gr.Row(elem_classes="lm-actions"):
            self.button = gr.Button(label, scale=0, **style)
            stop = gr.Button(msg("Stop"), visible=False, scale=0, min_width=90, elem_id=f"{kind}-stop")
        super().__init__(
            context,
            kind,
            running={self.button: gr.update(interactive=False), stop: gr.update(visible=True)},
            idle={self.button: gr.update(interactive=True), stop: gr.update(visible=False)},
            stop=stop.click,
            progress=gr.HTML(elem_id=f"{kind}-progress"),
            notice=gr.HTML(elem_id=f"{kind}-notice"),
            starting=starting,
            queue=queue,
        )

    def wire(
        self, inputs: list[Any], outputs: list[Any], start: Start, begin: Callable[[], list[Any]] = lambda: []
    ) -> Any:
        """Run `start` on a click of the button; returns the last event, to chain on. See `Runner.on`."""
        super().wire(inputs, outputs, start)
        return self.on(self.button.click, begin=begin)
