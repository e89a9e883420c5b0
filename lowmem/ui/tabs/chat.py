"""A conversation, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from lowmem.events import Chunk, Step
from lowmem.generate.options import GenerateOptions
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import say
from lowmem.ui.parts.bind import HEAVY, QUICK, Jobs, bounded, notice, pump, stops
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.service.engine import Engine

KIND = "chat"
Message = dict[str, Any]


class Chat:
    """Built where it stands in the layout, wired once the options exist."""

    def __init__(self, engine: Engine, jobs: Jobs) -> None:
        self.engine, self.jobs = engine, jobs
        self.history = gr.Chatbot(
            show_label=False,
            label=say("chat"),
            height="100%",
            buttons=["copy"],
            layout="bubble",
            elem_id="chat",
            placeholder=f'<p class="lm-muted">{say("chat_empty")}</p>',
            reasoning_tags=[("<think>", "</think>")],
            allow_tags=False,
        )
        self.live = gr.HTML(render.live(None), elem_id="chat-live")
        self.notice = gr.HTML(elem_id="chat-notice")
        self.message = gr.Textbox(
            placeholder=say("message_hint"),
            label=say("message"),
            show_label=False,
            submit_btn=say("send"),
            lines=1,
            max_lines=8,
            elem_id="message",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )

    def wire(
        self, sidebar: Sidebar, system: gr.Textbox, options: list[Any], read: Callable[..., GenerateOptions]
    ) -> None:
        """`read` turns the values of `options` into GenerateOptions."""
        self._read = read
        begun = [self.message, self.history, self.live, self.notice]
        starts = (
            self.message.submit(self._begin, [self.message, self.history], begun, **QUICK),
            self.history.retry(self._retry, self.history, begun, **QUICK),
        )
        for start in starts:
            ran = start.then(self._answer, [self.history, system, *options], begun, **HEAVY)
            sidebar.after(ran)
        stops(self.message.stop, self.jobs, KIND, self.live)
        self.history.undo(self._undo, self.history, [self.history, self.message], **QUICK)
        self.history.clear(lambda: [render.live(None), ""], None, [self.live, self.notice], **QUICK)

    def _begin(self, message: str, history: list[Message], request: gr.Request) -> list[Any]:
        if not message.strip():
            return [gr.skip(), gr.skip(), render.live(None), ""]
        return self._started([*history, {"role": "user", "content": message}], request)

    def _retry(self, history: list[Message], request: gr.Request, data: gr.RetryData) -> list[Any]:
        return self._started(history[: int(data.index) + 1], request)  # type: ignore[arg-type]

    def _started(self, history: list[Message], request: gr.Request) -> list[Any]:
        self.jobs.begin(request, KIND)
        note = say("waiting", busy=self.engine.busy) if self.engine.busy else say("reading")
        return [gr.Textbox("", submit_btn=False, stop_btn=say("stop")), history, render.progress(Step(0, 0, note)), ""]

    def _undo(self, history: list[Message], data: gr.UndoData) -> list[Any]:
        index = int(data.index)  # type: ignore[arg-type]
        return [history[:index], text_of(history[index])]

    def _answer(self, history: list[Message], system: str, request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        if not history or history[-1]["role"] != "user":
            return
        answer, last, trouble = "", None, ""
        try:
            with self.jobs.running(request, KIND) as token:
                messages = conversation(history, system)
                bounded(*(message["content"] for message in messages))
                for events in pump(self.engine.chat(messages, self._read(*values), token), token):
                    chunks = [event for event in events if isinstance(event, Chunk)]
                    steps = [event for event in events if isinstance(event, Step)]
                    answer += "".join(chunk.text for chunk in chunks)
                    last = chunks[-1] if chunks else last
                    shown = render.live(last) if last else render.progress(steps[-1]) if steps else gr.skip()
                    yield [gr.skip(), [*history, _assistant(answer)] if chunks else gr.skip(), shown, gr.skip()]
        except Exception as error:
            trouble = notice(error)
        ready: dict[str, Any] = {"submit_btn": say("send"), "stop_btn": False}
        if answer:
            yield [gr.Textbox(**ready), [*history, _assistant(answer)], render.live(last), trouble]
        else:  # the message goes back into its box: two questions in a row are no conversation
            yield [
                gr.Textbox(text_of(history[-1]), **ready),
                history[:-1],
                render.live(None),
                trouble or render.quiet(say("silent")),
            ]


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def conversation(history: list[Message], system: str = "") -> list[dict[str, str]]:
    """Plain messages for the engine, the system prompt first."""
    opening = [{"role": "system", "content": system.strip()}] if system.strip() else []
    return opening + [{"role": str(message["role"]), "content": text_of(message)} for message in history]


def text_of(message: Message) -> str:
    """The text of a message whose content is a string or gradio's list of blocks."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(block if isinstance(block, str) else block.get("text", "") for block in content)
