"""Which results the page serves by their path: those in a folder whose name only its maker learns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lowmem.settings import settings

_SECRET_NAME = re.compile(r"(.*-)?[0-9a-f]{32}")
"""As `results.new_folder` and `Access.results` make them."""

_PATH = re.compile(r"/file[=/](.*)", re.DOTALL)


class SecretFolders:
    """ASGI middleware of a public page: 404 for results of its owner, whose folders have names that can be guessed.

    Gradio serves every file of the folder that the page's own downloads come from.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Any = self._app
        if scope["type"] == "http" and (found := _PATH.search(scope["path"])) and not _is_served(found[1]):
            answer = PlainTextResponse("Not found", 404)
        await answer(scope, receive, send)


def _is_served(path: str) -> bool:
    outputs = settings().outputs.resolve()
    try:
        wanted = Path("/", path).resolve()
    except (OSError, RuntimeError, ValueError):
        return False
    if not wanted.is_relative_to(outputs):
        return True  # gradio's own rules
    return any(_SECRET_NAME.fullmatch(part) for part in wanted.relative_to(outputs).parts)
