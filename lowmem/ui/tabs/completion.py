"""Text in, its continuation out, streamed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lowmem.events import Chunk, Step
from lowmem.generate.options import GenerateOptions
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.edge import shown
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import HEAVY, QUICK, TEXT_LIMIT, Jobs, bounded, notice, pump, stops
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import Engine

KIND = "completion"


class Completion:
    """Built where it stands in the layout, wired once the options exist."""

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine, self.jobs = engine, jobs
        self.prompt = gr.Textbox(
            label=say("prompt"),
            placeholder=say("prompt_hint"),
            lines=5,
            max_lines=12,
            max_length=TEXT_LIMIT,
            elem_id="prompt",
        )
        with gr.Row(elem_classes="lm-actions"):
            self.run = gr.Button(say("continue"), variant="primary", scale=0, min_width=180, elem_id="continue")
            self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id="stop-completion")
        self.live = gr.HTML()
        self.notice = gr.HTML(elem_id="completion-notice")
        self.text = gr.Textbox(
            label=say("continuation"),
            lines=8,
            max_lines=24,
            interactive=False,
            buttons=["copy"],
            elem_id="continuation",
        )

    def wire(self, sidebar: Sidebar, options: list[Any], read: Callable[..., GenerateOptions]) -> None:
        self._read = read
        outputs = [self.run, self.stop, self.text, self.live, self.notice]
        started = self.run.click(self._begin, None, outputs, **QUICK)
        sidebar.after(started.then(self._continue, [self.prompt, *options], outputs, **HEAVY))
        stops(self.stop.click, self.jobs, KIND, self.live)

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        note = say("waiting", busy=self.engine.busy) if self.engine.busy else say("reading")
        return [gr.Button(interactive=False), gr.Button(visible=True), "", render.progress(Step(0, 0, note)), ""]

    def _continue(self, prompt: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        answers: dict[int, str] = defaultdict(str)
        last, trouble = None, ""
        try:
            with self.jobs.running(request, KIND) as token:
                bounded(prompt)
                for events in pump(self.engine.generate(prompt, self._read(*values), token, raw=True), token):
                    chunks = [event for event in events if isinstance(event, Chunk)]
                    steps = [event for event in events if isinstance(event, Step)]
                    for chunk in chunks:
                        answers[chunk.index] += chunk.text
                    last = chunks[-1] if chunks else last
                    shown = render.live(last) if last else render.progress(steps[-1]) if steps else gr.skip()
                    yield [gr.skip(), gr.skip(), joined(answers), shown, gr.skip()]
        except Exception as error:
            trouble = notice(error)
        yield [gr.Button(interactive=True), gr.Button(visible=False), joined(answers), render.live(last), trouble]


def joined(answers: dict[int, str]) -> str:
    """One answer as it is; several under numbered headings."""
    if len(answers) <= 1:
        return "".join(answers.values())
    return "\n\n".join(f"— {shown(say('answer', number=index + 1))} —\n{answers[index]}" for index in sorted(answers))
