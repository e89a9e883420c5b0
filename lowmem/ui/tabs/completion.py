"""Text in, its continuation out, streamed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Chunk
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.ui.html import plan as render
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.failures import TEXT_LIMIT, bounded
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.service.prompts import joined


class Completion:
    """Creates its components in the current layout; wired once the options exist."""

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.prompt = gr.Textbox(
            label=msg("Text to continue"),
            placeholder=msg("Once upon a time"),
            lines=5,
            max_lines=12,
            max_length=TEXT_LIMIT,
            elem_id="prompt",
        )
        self.runner = ButtonRunner(context, "completion", msg("Continue the text"), starting=msg("Reading the prompt"))
        self.text = gr.Textbox(
            label=msg("Continuation"),
            lines=8,
            max_lines=24,
            interactive=False,
            buttons=["copy"],
            elem_id="continuation",
        )

    def wire(self, options: list[Any], read: Callable[..., GenerateOptions]) -> None:
        """`read` turns the values of `options` into GenerateOptions."""

        def start(token: CancelToken, prompt: str, *values: Any) -> tuple[Iterator[Any], View]:
            bounded(prompt)
            texts: dict[int, str] = defaultdict(str)
            live = ""

            def view(gathered: Sequence[Any]) -> list[Any]:
                nonlocal live
                for chunk in (event for event in gathered if isinstance(event, Chunk)):
                    texts[chunk.index] += chunk.text
                live = render.status(gathered, live)
                return [live, joined(texts)]

            return self.engine.generate(prompt, read(*values), token, raw=True), view

        outputs = [self.runner.progress, self.text]
        self.runner.wire([self.prompt, *options], outputs, start, begin=lambda: [gr.skip(), ""])
