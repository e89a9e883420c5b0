"""Many prompts at once: answers in a table as they come, then as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Completion, Step
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.ui.html import plan as render
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.failures import TEXT_LIMIT
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.service import prompts


class Batch:
    """Creates its components in the current layout; wired once the options exist."""

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.lines = gr.Textbox(
            label=msg("Prompts, one per line"),
            placeholder=msg("What is a KV cache?\nName three rivers."),
            lines=5,
            max_lines=12,
            max_length=TEXT_LIMIT,
            elem_id="prompts",
        )
        self.file = gr.File(
            label=msg("Or a file: .txt, .csv or .jsonl, up to 2 MB"),
            file_types=[".txt", ".csv", ".jsonl"],
            height=124,
            elem_id="prompt-file",
        )
        with gr.Row(elem_id="batch-controls"):
            self.size = gr.Slider(
                0,
                64,
                value=0,
                step=1,
                label=msg("Batch size"),
                info=msg("Prompts in parallel. 0 = as many as the budget allows."),
                min_width=220,
                buttons=[],
            )
            self.template = gr.Checkbox(
                True,
                label=msg("Use the chat template"),
                info=msg("When off, each prompt is continued as plain text."),
                min_width=220,
            )
        self.runner = ButtonRunner(context, "batch", msg("Answer all prompts"), starting=msg("Reading the prompt"))
        self.table = gr.HTML(elem_id="batch-table")
        with gr.Row(visible=False, elem_classes="lm-actions") as self.files:
            self.csv = gr.DownloadButton(msg("Download CSV"), size="sm", scale=0, min_width=150, elem_id="csv")
            self.jsonl = gr.DownloadButton(msg("Download JSONL"), size="sm", scale=0, min_width=150, elem_id="jsonl")

    def wire(self, options: list[Any], read: Callable[..., GenerateOptions]) -> None:
        """`read` turns the values of `options` into GenerateOptions."""

        def start(
            token: CancelToken, lines: str, file: str | None, size: float, template: bool, *values: Any
        ) -> tuple[Iterator[Any], View]:
            texts, chosen = prompts.gather(lines, file), read(*values)
            events = self.engine.batch(texts, chosen, token, raw=not template, batch_size=int(size))
            return events, _view(len(texts) * chosen.num_return_sequences)

        outputs = [self.runner.progress, self.table, self.files, self.csv, self.jsonl]
        inputs = [self.lines, self.file, self.size, self.template, *options]
        self.runner.wire(inputs, outputs, start, begin=lambda: [gr.skip(), "", gr.Row(visible=False)])


def _view(total: int) -> View:
    rows: list[Completion] = []

    def view(gathered: Sequence[Any]) -> list[Any]:
        rows.extend(event for event in gathered if isinstance(event, Completion))
        if not gathered:
            return ["", render.table(rows), *_downloads(rows)]
        steps = [event for event in gathered if isinstance(event, Step)]
        counted = Step(len(rows), total, msg("{done} of {total} answered", done=len(rows), total=total))
        progress = render.progress(steps[-1] if steps and not rows else counted)
        return [progress, render.table(rows), gr.skip(), gr.skip(), gr.skip()]

    return view


def _downloads(rows: list[Completion]) -> list[Any]:
    if not rows:
        return [gr.Row(visible=False), gr.skip(), gr.skip()]
    table, lines = prompts.write_results(rows)
    return [gr.Row(visible=True), gr.DownloadButton(value=str(table)), gr.DownloadButton(value=str(lines))]
