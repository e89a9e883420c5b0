"""The edge of the page: what a visitor is about to see, in their language.

Everything inside speaks English. On its way out it passes here: the page's configuration, and what handlers return.
Shown texts change (labels, help, names of choices, HTML), values never do. Text between `translate="no"` tags, what
models and visitors wrote, stays as it is; so do the named endpoints, which are for programs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lowmem.plots.figure import replace_texts
from lowmem.ui.i18n.translate import SOURCE, preferred, translate, translate_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LANGUAGE: ContextVar[str] = ContextVar("language", default=SOURCE)

SHOWN = ("label", "info", "placeholder", "submit_btn", "stop_btn")
WRITTEN = ("button",)  # components whose value is a label


class Languages:
    """ASGI middleware: what the visitor's browser asks for, for the page that is about to be sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            LANGUAGE.set(preferred(Headers(scope=scope).get("accept-language", "")))
        await self.app(scope, receive, send)


class Page(gr.Blocks):
    """Blocks that speak their visitor's language, or `language` to everybody once it is set."""

    language: str | None = None

    @property
    def config(self) -> Any:
        """The page's configuration as gradio sends it."""
        language = self.language or LANGUAGE.get()
        if language not in self._configs:
            self._configs[language] = translated_config(self._configs[SOURCE], language)
        return self._configs[language]

    @config.setter
    def config(self, config: Any) -> None:
        self._configs = {SOURCE: config}

    async def process_api(self, *args: Any, **kwargs: Any) -> Any:
        request = kwargs.get("request")
        asked = request.headers.get("accept-language", "") if isinstance(request, gr.Request) else ""
        before = LANGUAGE.set(self.language or preferred(asked))
        try:
            return await super().process_api(*args, **kwargs)
        finally:
            LANGUAGE.reset(before)

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        outputs = await super().postprocess_data(block_fn, predictions, state)
        language = LANGUAGE.get()
        if language == SOURCE:
            return outputs
        kinds = [block.get_block_name() for block in block_fn.outputs]
        return [translated(kind, value, language) for kind, value in zip(kinds, outputs, strict=False)]


def shown(text: str) -> str:
    """`text` as the visitor who is being answered reads it; for what leaves in another way than through an output."""
    return translate(text, LANGUAGE.get())


def shown_sheet(figure: Figure) -> Figure:
    """A figure with its texts in the visitor's language."""
    return replace_texts(figure, shown)


def translated_config(config: Mapping[str, Any], language: str) -> dict[str, Any]:
    """A copy of a page's configuration with every shown text in `language`."""
    components = [
        one if one["type"] == "api" else one | {"props": translated_props(one["type"], one["props"], language)}
        for one in config["components"]
    ]
    return {**config, "components": components}


def translated(kind: str, value: Any, language: str) -> Any:
    """What a handler returned for a component of `kind`: an update of its properties, or a value."""
    if isinstance(value, dict) and value.get("__type__") == "update":
        return translated_props(kind, value, language)
    return translated_value(kind, value, language)


def translated_props(kind: str, props: Mapping[str, Any], language: str) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key in SHOWN:
        if isinstance(text := props.get(key), str):
            changed[key] = translate_html(text, language) if text.startswith("<") else translate(text, language)
    if "value" in props:
        changed["value"] = translated_value(kind, props["value"], language)
    if props.get("choices"):
        changed["choices"] = [(translate(str(name), language), value) for name, value in props["choices"]]
    return {**props, **changed}


def translated_value(kind: str, value: Any, language: str) -> Any:
    if not isinstance(value, str):
        return value
    if kind == "html":
        return translate_html(value, language)
    return translate(value, language) if kind in WRITTEN else value
