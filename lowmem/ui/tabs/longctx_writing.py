"""Continuing a long text and chatting about it: one class per mode, created in the layout and wired later."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk
from lowmem.messages import msg
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.runner import ButtonRunner, View
from lowmem.ui.service.longctx import TextSource
from lowmem.ui.service.results import new_folder
from lowmem.ui.tabs.chat import conversation
from lowmem.ui.tabs.longctx_inputs import Inputs

SHOWN_CHARACTERS = 6_000
"""The page shows only the end of an unbounded generation; the whole text is in a file."""

CHAT_TOKENS = 1024
"""The longest answer about a text."""


class ContinueMode:
    """Unbounded generation: continue the text until Stop."""

    key = "continue"

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.runner = ButtonRunner(context, "long-continue", msg("Generate until stopped"))
        self.live = gr.HTML(elem_id="long-live")
        self.output = gr.Textbox(
            label=msg("Continuation"),
            lines=10,
            max_lines=16,
            interactive=False,
            buttons=["copy"],
            elem_id="long-output",
        )
        self.link = gr.HTML(elem_id="long-link")

    def wire(self, tab: Inputs) -> None:
        self.tab = tab
        self.runner.wire([*tab.source, *tab.options], [self.live, self.output, self.link], self._start)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, *values: Any
    ) -> tuple[Iterator[Any], View]:
        options = self.tab.read(*values)
        self.engine.require_model()
        path = new_folder("stream") / "continuation.txt"
        shown, last = "", None

        def events() -> Iterator[Any]:
            prompt = TextSource(text, file, address).read(token).text
            with path.open("w", encoding="utf-8") as full:
                for event in self.engine.generate(prompt, options, token, raw=True):
                    if isinstance(event, Chunk):
                        full.write(event.text)
                    yield event

        def full_output() -> str:
            if shown:
                return parts.link(path, msg("Full output"))
            shutil.rmtree(path.parent, ignore_errors=True)  # stopped before the first token
            return ""

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal shown, last
            chunks = [event for event in gathered if isinstance(event, Chunk)]
            last = chunks[-1] if chunks else last
            shown = (shown + "".join(chunk.text for chunk in chunks))[-SHOWN_CHARACTERS:]
            return [render.live(last), shown, gr.skip() if gathered else full_output()]

        return events(), view


class ChatMode:
    """A conversation with the text as its first message."""

    key = "chat"

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.history = gr.Chatbot(
            show_label=False, label=msg("Chat"), height=340, buttons=["copy"], elem_id="long-chat", allow_tags=False
        )
        self.live = gr.HTML(elem_id="long-chat-live")
        self.message = gr.Textbox(
            label=msg("Message"),
            placeholder=msg("Ask about the text"),
            show_label=False,
            max_length=10_000,
            elem_id="long-message",
        )
        self.runner = ButtonRunner(context, "long-chat-run", msg("Send"))

    def wire(self, tab: Inputs) -> None:
        self.tab = tab
        inputs = [*tab.source, self.history, self.message, *tab.options]
        self.runner.wire(inputs, [self.history, self.message, self.live], self._start)
        self.runner.on(self.message.submit)

    def _start(
        self, token: CancelToken, text: str, file: str, address: str, history: list[Any], message: str, *values: Any
    ) -> tuple[Iterator[Any], View]:
        if not message.strip():
            raise BadInput(msg("There is nothing to send."), msg("Write something first."))
        options = replace(self.tab.read(*values), unbounded=False, max_new_tokens=CHAT_TOKENS)
        self.engine.require_model()
        messages = [*history, {"role": "user", "content": message}]
        answer, last = "", None

        def events() -> Iterator[Any]:
            whole = TextSource(text, file, address).read(token).text
            first = {"role": "user", "content": f"Read this text:\n\n{whole}\n\nI will ask you about it."}
            read = {"role": "assistant", "content": "I have read it. What do you want to know?"}
            yield from self.engine.chat([first, read, *conversation(messages)], options, token)

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal answer, last
            chunks = [event for event in gathered if isinstance(event, Chunk)]
            answer += "".join(chunk.text for chunk in chunks)
            last = chunks[-1] if chunks else last
            if not answer and not gathered:
                return [history, message, render.live(None)]
            return [[*messages, {"role": "assistant", "content": answer}], "", render.live(last)]

        return events(), view
