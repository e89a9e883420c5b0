"""Many prompts at once: answers in a table as they come, then as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lowmem.events import Completion, Step
from lowmem.generate.options import GenerateOptions
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import HEAVY, QUICK, TEXT_LIMIT, Jobs, notice, pump, stops
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import Engine
from lowmem.ui.tabs import prompts

KIND = "batch"


class Batch:
    """Built where it stands in the layout, wired once the options exist."""

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine, self.jobs = engine, jobs
        self.lines = gr.Textbox(
            label=say("prompts"),
            placeholder=say("prompts_hint"),
            lines=5,
            max_lines=12,
            max_length=TEXT_LIMIT,
            elem_id="prompts",
        )
        self.file = gr.File(label=say("file"), file_types=[".txt", ".csv", ".jsonl"], height=124, elem_id="prompt-file")
        with gr.Row(elem_id="batch-controls"):
            self.size = gr.Slider(
                0, 64, value=0, step=1, label=say("batch_size"), info=say("batch_size_help"), min_width=220, buttons=[]
            )
            self.template = gr.Checkbox(True, label=say("template"), info=say("template_help"), min_width=220)
        with gr.Row(elem_classes="lm-actions"):
            self.run = gr.Button(say("run_batch"), variant="primary", scale=0, min_width=180, elem_id="run-batch")
            self.stop = gr.Button(say("stop"), visible=False, scale=0, min_width=90, elem_id="stop-batch")
        self.progress = gr.HTML()
        self.notice = gr.HTML(elem_id="batch-notice")
        self.table = gr.HTML(elem_id="batch-table")
        with gr.Row(visible=False, elem_classes="lm-actions") as self.files:
            self.csv = gr.DownloadButton(say("csv"), size="sm", scale=0, min_width=150, elem_id="csv")
            self.jsonl = gr.DownloadButton(say("jsonl"), size="sm", scale=0, min_width=150, elem_id="jsonl")

    def wire(self, sidebar: Sidebar, options: list[Any], read: Callable[..., GenerateOptions]) -> None:
        self._read = read
        outputs = [self.run, self.stop, self.progress, self.table, self.notice, self.files, self.csv, self.jsonl]
        inputs = [self.lines, self.file, self.size, self.template, *options]
        started = self.run.click(self._begin, None, outputs[:6], **QUICK)
        sidebar.after(started.then(self._answer_all, inputs, outputs, **HEAVY))
        stops(self.stop.click, self.jobs, KIND, self.progress)

    def _begin(self, request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        note = say("waiting", busy=self.engine.busy) if self.engine.busy else say("reading")
        return [
            gr.Button(interactive=False),
            gr.Button(visible=True),
            render.progress(Step(0, 0, note)),
            "",
            "",
            gr.Row(visible=False),
        ]

    def _answer_all(
        self, lines: str, file: str | None, size: float, template: bool, request: gr.Request, *values: Any
    ) -> Iterator[list[Any]]:
        rows: list[Completion] = []
        progress, trouble = "", ""
        try:
            with self.jobs.running(request, KIND) as token:
                asked, options = prompts.gather(lines, file), self._read(*values)
                events = self.engine.batch(asked, options, token, raw=not template, batch_size=int(size))
                for gathered in pump(events, token):
                    fresh = [event for event in gathered if isinstance(event, Completion)]
                    rows += fresh
                    progress = _progress(gathered, len(rows), len(asked) * options.num_return_sequences)
                    yield [gr.skip(), gr.skip(), progress, render.table(rows) if fresh else gr.skip(), *[gr.skip()] * 4]
        except Exception as error:
            trouble = notice(error)
        yield [
            gr.Button(interactive=True),
            gr.Button(visible=False),
            "",
            render.table(rows),
            trouble,
            *_downloads(rows),
        ]


def _progress(events: list[Any], done: int, total: int) -> str:
    steps = [event for event in events if isinstance(event, Step)]
    if steps and not done:
        return render.progress(steps[-1])
    return render.progress(Step(done, total, say("answered", done=done, total=total)))


def _downloads(rows: list[Completion]) -> list[Any]:
    if not rows:
        return [gr.Row(visible=False), gr.skip(), gr.skip()]
    table, lines = prompts.write_results(rows)
    return [gr.Row(visible=True), gr.DownloadButton(value=str(table)), gr.DownloadButton(value=str(lines))]
