"""The page in its visitor's language.

Messages are translated where they enter HTML (`escape`) or leave through a component (`Page`); other text, such
as that of models and visitors, stays unchanged. Named endpoints are for programs and answer in English.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.blocks import Block
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lowmem.messages import ENGLISH, LANGUAGE, Message, preferred, translate
from lowmem.ui.sessions import Sessions


def escape(text: str) -> str:
    """`text` for HTML, in the visitor's language."""
    return html.escape(translate(text))


def number(value: float, form: str = ",") -> str:
    """A number for HTML, with the signs of the visitor's language; `form` is a format specification."""
    return translate(Message(f"{{value:{form}}}", value=value))


class Html(str):
    """HTML that is sent with the page, before anybody is known: made anew for each language."""

    def __new__(cls, make: Callable[[], str]) -> Html:
        self = super().__new__(cls, make())
        self.make = make
        return self

    make: Callable[[], str]

    def __getnewargs__(self) -> tuple[Callable[[], str]]:  # type: ignore[override]
        return (self.make,)  # gradio copies its configuration

    def __str__(self) -> str:
        return self  # gradio shall keep the object


class Languages:
    """ASGI middleware: takes the language of the page from the browser's request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            LANGUAGE.set(preferred(Headers(scope=scope).get("accept-language", "")))
        await self.app(scope, receive, send)


class Page(gr.Blocks):
    """Blocks in the visitor's language, or in `language` for all once it is set."""

    language: str | None = None

    @property
    def config(self) -> Any:
        """The page's configuration as gradio sends it."""
        language = self.language or LANGUAGE.get()
        if language not in self._configs:
            before = LANGUAGE.set(language)
            try:
                self._configs[language] = shown(self._configs[ENGLISH])
            finally:
                LANGUAGE.reset(before)
        return self._configs[language]

    @config.setter
    def config(self, config: Any) -> None:
        self._configs = {ENGLISH: config}

    @property
    def state_holder(self) -> Any:
        return self._sessions

    @state_holder.setter
    def state_holder(self, holder: Any) -> None:
        """Gradio makes one with every launch."""
        holder.__class__ = Sessions
        self._sessions = holder

    async def process_api(self, block_fn: Any, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.get("request")
        accepted = request.headers.get("accept-language", "") if isinstance(request, gr.Request) else ""
        before = LANGUAGE.set(self.language or preferred(accepted))
        try:
            return await super().process_api(block_fn, *args, **kwargs)
        finally:
            LANGUAGE.reset(before)

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        private = block_fn.api_visibility == "private"
        return await super().postprocess_data(block_fn, shown(predictions) if private else predictions, state)


def shown(value: Any) -> Any:
    """A configuration, or what a handler returned, with every message in the visitor's language."""
    if LANGUAGE.get() == ENGLISH:
        return value
    match value:
        case Message():
            return translate(value)
        case Html():
            return value.make()
        case Block():
            return shown(value.constructor_args) | {"__type__": "update"}
        case dict():
            return {key: shown(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(map(shown, value))
    return value
