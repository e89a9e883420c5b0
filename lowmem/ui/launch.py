"""Serve the page: address, password, budget."""

from __future__ import annotations

import importlib.util
import logging
import secrets
import threading
from typing import Any

from starlette.middleware import Middleware

from lowmem.errors import BadInput, MissingDependency
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import msg
from lowmem.settings import settings
from lowmem.ui.headers import OwnResources
from lowmem.ui.language import Languages, Page
from lowmem.ui.page import build_ui
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import AUTO, Engine
from lowmem.ui.service.files import SecretFolders
from lowmem.ui.service.lane import SEATS
from lowmem.ui.service.rate_limits import VisitorLimits
from lowmem.ui.sessions import CAPACITY
from lowmem.ui.theme import CSS, HEAD, theme
from lowmem.units import parse_bytes

log = logging.getLogger("lowmem.ui")

VISITOR, OWNER = "lowmem", "owner"
ZEROGPU_BUDGET = "6G"  # what loads within a visitor's few seconds
UPLOAD_LIMIT = "2mb"
MEASURE_AFTER_SECONDS = 6.0
THREADS = SEATS + 64
"""Every action that waits in a lane holds one, and what returns at once must find another."""


def launch_options(*, public: bool = False) -> dict[str, Any]:
    """What every launch of the page passes to gradio; `public` limits what visitors may send and read."""
    outputs = settings().outputs
    return {
        "theme": theme(),
        "css_paths": CSS,
        "head": HEAD,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": UPLOAD_LIMIT,
        "max_threads": THREADS,
        "state_session_capacity": CAPACITY,
        "allowed_paths": [str(outputs)],
        "footer_links": ["api", "settings"],
        "app_kwargs": {
            "middleware": [
                Middleware(OwnResources),
                Middleware(Languages),
                *([Middleware(VisitorLimits), Middleware(SecretFolders)] if public else []),
            ]
        },
    }


def serve(
    share: bool = False,
    auth: str | None = None,
    host: str | None = None,
    port: int | None = None,
    budget: str | None = None,
    model: str | None = None,
    *,
    listed_only: bool = False,
    mcp: bool = False,
    lang: str | None = None,
    demo: Page | None = None,
    **launching: Any,
) -> tuple[str, str]:
    """Serve until interrupted; in a notebook's kernel return at once. Returns the local and the public address.

    On a public page (shared, on a Space, or listening beyond this machine) visitors have limits, see `access`
    and `limits`. Where there is a sign-in, the owner gets one of their own, which is printed once.

    Args:
        share: also through a public link; without `auth` a password is made up and printed.
        auth: "user:password", for everybody who may use the page.
        host, port: where to listen; this machine only by default.
        budget: the most memory that anybody's work may use on the computing device, such as "4G".
        model: the model that is proposed first.
        listed_only: visitors may run the listed models only; always so where `HF_TOKEN` could be spent on others.
        lang: the language of the page, whatever language the browser requests.
        mcp: serve the page's endpoints as MCP tools, too, below /gradio_api/mcp/.
        demo: a page that is built already.
        launching: more for gradio's `launch`.

    Raises:
        BadInput: `auth` or `budget` cannot be read.
        MissingDependency: `mcp` without the package.
    """
    if mcp and importlib.util.find_spec("mcp") is None:
        raise MissingDependency(
            msg("MCP tools need the package mcp, which is not installed."),
            msg('Install it: pip install "gradio[mcp]".'),
        )
    here = settings()
    public = share or here.host in ("space", "zerogpu") or host not in (None, "127.0.0.1", "localhost")
    sign_ins = _sign_ins(auth, share, public)
    owner = OWNER if len(sign_ins) > 1 else ""
    if demo is None or budget or model or public:
        access = Access(public, owner, any_model=not (listed_only or here.hub_token))
        engine = Engine(access=access)
        if budget:
            engine.ceiling = MemoryBudget.parse(**{"vram" if engine.hardware().gpus else "ram": budget})
        first = parse_bytes(ZEROGPU_BUDGET) if here.host == "zerogpu" and not budget else None
        demo = build_ui(engine, budget_bytes=first, model=model or AUTO)
    demo.language = lang or demo.language
    # Sharpens the prediction; waits, because a child that imports torch would delay the first page.
    measuring = threading.Timer(MEASURE_AFTER_SECONDS, measure_runtime_bytes)
    measuring.daemon = True
    measuring.start()
    _, local, shared = demo.launch(
        share=share,
        auth=sign_ins or None,
        server_name=host,
        server_port=port,
        mcp_server=mcp,
        **launch_options(public=public),
        **launching,
    )
    return local, shared or ""


def _sign_ins(auth: str | None, share: bool, public: bool) -> list[tuple[str, str]]:
    """Accounts for signing in: none, or one for everybody and, on a public page, one for the owner."""
    if not (auth or share):
        return []
    everybody = _credentials(auth) if auth else (VISITOR, secrets.token_urlsafe(9))
    if not auth:
        print(f"Sign in as {everybody[0]} with the password {everybody[1]}", flush=True)
    if not public:
        return [everybody]
    if everybody[0] == OWNER:
        raise BadInput(
            msg("{owner!r} is the sign-in of the page's owner.", owner=OWNER), msg("Give visitors another user name.")
        )
    owner = (OWNER, secrets.token_urlsafe(9))
    print(f"As the owner, who may also push and go over the budget: {owner[0]} with {owner[1]}", flush=True)
    return [everybody, owner]


def _credentials(auth: str) -> tuple[str, str]:
    user, colon, password = auth.partition(":")
    if not (user and colon and password):
        raise BadInput(msg("The sign-in lacks a user name or a password."), msg("Write it like --auth ada:secret."))
    return user, password
