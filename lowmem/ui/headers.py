"""What a browser may load for the page, nothing from elsewhere whatever a model writes, and what it may keep."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        # Gradio's page has inline scripts and styles, and compiles handlers written in JavaScript.
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "connect-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
"""Content-Security-Policy, see developer.mozilla.org/docs/Web/HTTP/CSP."""

HEADERS = {
    "content-security-policy": POLICY,
    "x-dns-prefetch-control": "off",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


STATIC = ("/assets/", "/static/", "/svelte/", "/theme.css")
"""What is the same for everybody. Browsers must not keep the rest on disk: answers with their prompts, results."""


class OwnResources:
    """ASGI middleware that adds `HEADERS`, and forbids caching of what is not `STATIC`.

    An answer is Markdown, and `![](https://elsewhere/?what-was-asked)` in it would send what the model was asked to
    whoever wrote the text that it read.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers: Any = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if not any(part in scope["path"] for part in STATIC):
                    headers["cache-control"] = "no-store"
            await send(message)

        await self.app(scope, receive, answer if scope["type"] == "http" else send)
