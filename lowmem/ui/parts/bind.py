"""Between the engine's generators and the page's handlers: worker thread, Stop, failures."""

from __future__ import annotations

import contextvars
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import gradio as gr

from lowmem.errors import BadInput, Cancelled, LowMemError
from lowmem.events import CancelToken, Step
from lowmem.messages import msg, translate
from lowmem.ui.html import plan as render
from lowmem.ui.language import escape

E = TypeVar("E")

log = logging.getLogger("lowmem.ui")

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
QUICK: dict[str, Any] = PRIVATE | {"queue": False}
ENGINE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "engine"}
HEAVY: dict[str, Any] = PRIVATE | ENGINE

FRAME_SECONDS = 1 / 4  # every frame costs server and browser some milliseconds, often on the same cores
TEXT_LIMIT = 200_000


class Jobs:
    """The Stop buttons of every open page: one token per page and kind of work."""

    def __init__(self) -> None:
        self._tokens: dict[tuple[str, str], CancelToken] = {}
        self._lock = threading.Lock()

    def begin(self, request: gr.Request, kind: str) -> CancelToken:
        """A fresh token, from the click on; work that still waits in the queue can be stopped too."""
        token = CancelToken()
        with self._lock:
            self._tokens[_page(request), kind] = token
        return token

    @contextmanager
    def running(self, request: gr.Request, kind: str) -> Iterator[CancelToken]:
        """The token of work that now starts; it is set when the work is abandoned."""
        key = (_page(request), kind)
        with self._lock:
            token = self._tokens.setdefault(key, CancelToken())
        try:
            yield token
        finally:
            token.set()
            with self._lock:
                if self._tokens.get(key) is token:
                    del self._tokens[key]

    def stop(self, request: gr.Request, kind: str) -> None:
        with self._lock:
            token = self._tokens.get((_page(request), kind))
        if token:
            token.set()

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        with self._lock:
            tokens = [token for (page, _), token in self._tokens.items() if page == _page(request)]
        for token in tokens:
            token.set()


def stops(trigger: Callable[..., Any], jobs: Jobs, kind: str, shown_in: Any) -> None:
    """Let an event say that work of `kind` is being stopped, then stop it: its final events come later."""

    def stop(request: gr.Request) -> None:
        jobs.stop(request, kind)

    said = trigger(lambda: render.progress(Step(0, 0, msg("Stopping"))), None, shown_in, **QUICK)
    said.then(stop, None, None, **QUICK)


def _page(request: gr.Request | None) -> str:
    return (request.session_hash if request else None) or "api"


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def pump(events: Iterable[E], token: CancelToken) -> Iterator[list[E]]:
    """Run a generator of the engine in its own thread; yield what gathered, at most 4 times a second.

    The engine never waits for the page. An empty list is a heartbeat: nothing happened for
    a second. Abandoning the iteration sets the token. An exception of the engine is raised here.
    """
    token.check()
    inbox: SimpleQueue[Any] = SimpleQueue()
    # The context identifies the visitor: access and the quota of a lent GPU depend on it.
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_drain, events, inbox), daemon=True, name="lowmem-job").start()
    try:
        while True:
            gathered = _gather(inbox)
            tail = gathered[-1] if gathered else None
            ended = tail is _END or isinstance(tail, _Failure)
            if ended:
                gathered.pop()
            if gathered or not ended:
                yield gathered
            if isinstance(tail, _Failure):
                raise tail.error
            if ended:
                return
            time.sleep(FRAME_SECONDS)
    finally:
        token.set()


def _gather(inbox: SimpleQueue[Any]) -> list[Any]:
    gathered = []
    try:
        gathered.append(inbox.get(timeout=1.0))
        while True:
            gathered.append(inbox.get_nowait())
    except Empty:
        return gathered


def _drain(events: Iterable[Any], inbox: SimpleQueue[Any]) -> None:
    try:
        for event in events:
            inbox.put(event)
        inbox.put(_END)
    except BaseException as error:
        inbox.put(_Failure(error))


def explain(error: Exception) -> tuple[str, str]:
    """(sentence, hint) for a person. A bug keeps its traceback in the log, under a short id."""
    if isinstance(error, LowMemError):
        return error.message, error.hint
    short = secrets.token_hex(3)
    log.error("bug %s", short, exc_info=error)
    return msg("Something went wrong inside lowmem."), msg("See the log for details ({id}).", id=short)


def notice(error: Exception, *, toast: bool = True) -> str:
    """The failure as HTML that stays in place, and as a toast (only queued events can show one)."""
    message, hint = map(escape, explain(error))
    if isinstance(error, Cancelled):
        return f'<p class="lm-notice" data-kind="quiet" role="status">{message}</p>'
    if toast:
        gr.Warning(f"{message} {hint}".strip(), title=translate(msg("Something went wrong")))
    return f'<div class="lm-notice" data-kind="error" role="alert"><strong>{message}</strong> {hint}</div>'


def bounded(*texts: str) -> None:
    """Refuse text that is beyond any context.

    Raises:
        BadInput: empty, or above `TEXT_LIMIT` characters in all.
    """
    count = sum(map(len, texts))
    if not any(text.strip() for text in texts):
        raise BadInput(msg("There is nothing to send."), msg("Write something first."))
    if count > TEXT_LIMIT:
        raise BadInput(
            msg("The text has {count:,} characters, more than the {limit:,} allowed.", count=count, limit=TEXT_LIMIT),
            msg("Shorten it."),
        )
