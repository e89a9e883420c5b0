"""A conversation, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Chunk
from lowmem.generate.chat import ChatMessage
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import Html, escape
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.event_settings import QUICK
from lowmem.ui.parts.failures import bounded
from lowmem.ui.parts.runner import Runner, View


class Chat:
    """Creates its components in the current layout; wired once the options exist."""

    def __init__(self, context: Context) -> None:
        self.engine = context.engine
        self.history = gr.Chatbot(
            show_label=False,
            label=msg("Chat"),
            height="100%",
            buttons=["copy"],
            layout="bubble",
            elem_id="chat",
            placeholder=Html(lambda: f'<p class="lm-muted">{escape(msg("Ask a question to start."))}</p>'),
            reasoning_tags=[("<think>", "</think>")],
            allow_tags=False,
        )
        self.live = gr.HTML(Html(lambda: render.live(None)), elem_id="chat-live")
        self.notice = gr.HTML(elem_id="chat-notice")
        self.message = gr.Textbox(
            placeholder=msg("Write a message"),
            label=msg("Message"),
            show_label=False,
            submit_btn=msg("Send"),
            lines=1,
            max_lines=8,
            elem_id="message",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )

        self.runner = Runner(
            context,
            "chat",
            running={},
            idle={},
            stop=self.message.stop,
            progress=self.live,
            notice=self.notice,
            starting=msg("Reading the prompt"),
        )

    def wire(self, system: gr.Textbox, options: list[Any], read: Callable[..., GenerateOptions]) -> None:
        """`read` turns the values of `options` into GenerateOptions."""

        def start(
            token: CancelToken, history: list[ChatMessage], prompt: str, *values: Any
        ) -> tuple[Iterator[Any], View] | None:
            if not history or history[-1]["role"] != "user":
                return None

            def events() -> Iterator[Any]:
                messages = conversation(history, prompt)
                bounded(*(message["content"] for message in messages))
                yield from self.engine.chat(messages, read(*values), token)

            return events(), self._view(history)

        outputs = [self.message, self.history, self.live, self.notice]
        self.runner.wire([self.history, system, *options], outputs, start)
        self.runner.on(self.message.submit, begin=_asked, begin_inputs=[self.message, self.history])
        retried = self.history.retry(self._retry, self.history, self.history, **QUICK)
        self.runner.on(retried.then, begin=lambda: [_busy(), gr.skip()])
        self.history.undo(self._undo, self.history, [self.history, self.message], **QUICK)
        self.history.clear(lambda: [render.live(None), ""], None, [self.live, self.notice], **QUICK)

    def _view(self, history: list[ChatMessage]) -> View:
        answer, live = "", ""

        def view(gathered: Sequence[Any]) -> list[Any]:
            nonlocal answer, live
            answer += "".join(event.text for event in gathered if isinstance(event, Chunk))
            live = render.status(gathered, live)
            answered = [*history, {"role": "assistant", "content": answer}] if answer else gr.skip()
            if gathered:
                return [gr.skip(), answered, live, gr.skip()]
            if answer:
                return [_ready(), answered, live, ""]
            # Without an answer the message goes back into its box: two questions in a row are no conversation.
            return [
                _ready(text_of(history[-1])),
                history[:-1],
                render.live(None),
                parts.quiet(msg("The model returned an empty answer.")),
            ]

        return view

    def _retry(self, history: list[ChatMessage], data: gr.RetryData) -> list[ChatMessage]:
        return history[: int(data.index) + 1]  # type: ignore[arg-type]

    def _undo(self, history: list[ChatMessage], data: gr.UndoData) -> list[Any]:
        index = int(data.index)  # type: ignore[arg-type]
        return [history[:index], text_of(history[index])]


def _asked(message: str, history: list[ChatMessage]) -> list[Any] | None:
    if not message.strip():
        return None
    return [_busy(), [*history, {"role": "user", "content": message}]]


def _busy() -> Any:
    """The message box while an answer is written."""
    return gr.Textbox("", submit_btn=False, stop_btn=msg("Stop"))


def _ready(*text: str) -> Any:
    """The message box, with `text` put back if there is one."""
    return gr.Textbox(*text, submit_btn=msg("Send"), stop_btn=False)


def conversation(history: list[ChatMessage], system: str = "") -> list[ChatMessage]:
    """Plain messages for the engine, the system prompt first."""
    opening: list[ChatMessage] = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return opening + [{"role": str(message["role"]), "content": text_of(message)} for message in history]


def text_of(message: ChatMessage) -> str:
    """The text of a message whose content is a string or gradio's list of blocks."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(block if isinstance(block, str) else block.get("text", "") for block in content)
