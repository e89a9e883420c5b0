"""Runs the engine's generators in a worker thread for the page's handlers, and stops them."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import gradio as gr

from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.ui.html import plan as render
from lowmem.ui.parts.event_settings import QUICK

E = TypeVar("E")

FRAME_SECONDS = 1 / 4  # every frame costs server and browser some milliseconds, often on the same cores


class StopTokens:
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


def stops(trigger: Callable[..., Any], stop_tokens: StopTokens, kind: str, shown_in: Any) -> None:
    """Let an event say that work of `kind` is being stopped, then stop it: its final events come later."""

    def stop(request: gr.Request) -> None:
        stop_tokens.stop(request, kind)

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
    threading.Thread(target=context.run, args=(_drain, events, inbox), daemon=True, name="lowmem-worker").start()
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
