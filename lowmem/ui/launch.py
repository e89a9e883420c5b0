"""Serve the page: address, password, budget."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.settings import settings
from lowmem.ui.engine import AUTO, Engine
from lowmem.ui.page import build_ui
from lowmem.ui.theme import CSS, HEAD, theme
from lowmem.units import parse_bytes

log = logging.getLogger("lowmem.ui")

UPLOAD_LIMIT = "2mb"
MEASURE_AFTER_SECONDS = 6.0


def launch_options() -> dict[str, Any]:
    """What every launch of the page passes to gradio."""
    outputs = settings().outputs
    return {
        "theme": theme(),
        "css_paths": CSS,
        "head": HEAD,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": UPLOAD_LIMIT,
        "allowed_paths": [str(outputs)],
        "footer_links": ["api", "settings"],
    }


def serve(
    share: bool = False,
    auth: str | None = None,
    host: str | None = None,
    port: int | None = None,
    budget: str | None = None,
    model: str | None = None,
    *,
    demo: gr.Blocks | None = None,
) -> None:
    """Serve until interrupted.

    Args:
        share: also through a public link; without `auth` a password is made up and printed.
        auth: "user:password".
        host, port: where to listen; this machine only by default.
        budget: memory that may be used on the computing device, such as "4G".
        model: the model that is proposed first.
        demo: a page that is built already.

    Raises:
        BadInput: `auth` or `budget` cannot be read.
    """
    credentials = _credentials(auth)
    if share and credentials is None:
        credentials = ("lowmem", secrets.token_urlsafe(9))
        print(f"Sign in as {credentials[0]} with the password {credentials[1]}", flush=True)
    public = share or settings().host in ("space", "zerogpu") or host not in (None, "127.0.0.1", "localhost")
    if demo is None or budget or model or public:
        demo = build_ui(
            Engine(public=public), budget_bytes=parse_bytes(budget) if budget else None, model=model or AUTO
        )
    # Sharpens the prediction; waits, because a child that imports torch would delay the first page.
    measuring = threading.Timer(MEASURE_AFTER_SECONDS, measure_runtime_bytes)
    measuring.daemon = True
    measuring.start()
    demo.launch(share=share, auth=credentials, server_name=host, server_port=port, **launch_options())


def _credentials(auth: str | None) -> tuple[str, str] | None:
    if not auth:
        return None
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise BadInput("The sign-in has no user or no password.", "Write it like --auth ada:secret.")
    return user, password
