"""One thread that looks at this process's memory, for the cap and for all peak meters.

It starts once, before a cap tightens, and not for every action: near the cap there may be no memory for a thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from lowmem.background import in_background

SECONDS = 0.01

Look = Callable[[int], None]
"""Called with the number of the tick, `SECONDS` after the one before."""

_looks: list[Look] = []
_lock = threading.Lock()  # held during a tick: a look that was removed is not running any more
_wanted = threading.Event()
_thread: Future[None] | None = None


def watch(look: Look) -> None:
    """Call `look` at every tick until `unwatch`. What it raises is ignored: near the cap not even a file can be read."""
    start()
    with _lock:
        _looks.append(look)
        _wanted.set()


def unwatch(look: Look) -> None:
    """End `watch`; `look` is not called after this returns."""
    with _lock:
        _looks.remove(look)
        if not _looks:
            _wanted.clear()


def start() -> None:
    """Start the thread unless it runs. Without anything to watch it sleeps.

    Raises:
        OutOfMemory: there is no memory for a new thread.
    """
    global _thread
    if _thread is None:
        _thread = in_background(_run)


def _run() -> None:
    tick = 0
    while True:
        try:
            time.sleep(SECONDS)
            _wanted.wait()
            tick += 1
            with _lock:
                for look in _looks:
                    with contextlib.suppress(Exception):
                        look(tick)
        except MemoryError:  # the next tick may succeed
            pass


def _after_fork() -> None:
    """A fork has none of its parent's threads, and this one may have held the lock."""
    global _thread, _lock
    _thread, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
