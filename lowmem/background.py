"""Blocking work that Stop interrupts: an iterator in a thread, a command in a child process, waiting for others.

A socket or a child cannot look at a `CancelToken`; here somebody else does, five times a second.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast

from filelock import FileLock, Timeout

from lowmem.events import CancelToken, Step

T = TypeVar("T")

TICK_SECONDS = 0.2
_QUEUED = 64


def interruptible(items: Iterable[T], cancel: CancelToken, seconds: float = math.inf) -> Iterator[T]:
    """`items`, made in a daemon thread; `Cancelled` within a tick even while the next one is awaited.

    Raises:
        TimeoutError: they are not all there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    made: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(_QUEUED)
    stop = threading.Event()
    threading.Thread(target=_pump, args=(items, made, stop), daemon=True, name="lowmem-io").start()
    try:
        while True:
            cancel.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            try:
                kind, item = made.get(timeout=TICK_SECONDS)
            except queue.Empty:
                continue
            if kind == "end":
                return
            if isinstance(item, BaseException):
                raise item
            yield cast(T, item)
    finally:
        stop.set()


def _pump(items: Iterable[T], made: queue.Queue[tuple[str, T | BaseException | None]], stop: threading.Event) -> None:
    def put(kind: str, item: T | BaseException | None = None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put((kind, item), timeout=TICK_SECONDS)
                return

    try:
        for item in items:
            put("item", item)
            if stop.is_set():
                break
    except BaseException as error:
        put("error", error)
    else:
        put("end")
    finally:
        if isinstance(items, Generator):
            items.close()


def stoppable(call: Callable[[], T], cancel: CancelToken) -> T:
    """The result of a blocking call; `Cancelled` within a tick when Stop is pressed."""
    return next(interruptible((call() for _ in range(1)), cancel))


@contextlib.contextmanager
def locked(target: Path, cancel: CancelToken, note: str) -> Iterator[Iterator[Step]]:
    """Hold the lock of `target` within the block, once the steps that this gives have been gone through.

    Args:
        note: what is said while another process, or another thread, holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"), thread_local=False)

    def waiting() -> Iterator[Step]:
        while True:
            try:
                lock.acquire(timeout=0)
                return
            except Timeout:
                yield Step(0, 0, note)
                cancel.wait(0.3)

    try:
        yield waiting()
    finally:
        lock.release()


def run_child(
    command: Sequence[str],
    note: str,
    cancel: CancelToken,
    *,
    watch: Path | None = None,
    total: int = 0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Generator[Step, None, tuple[int, str]]:
    """Run `command` quietly, killing it with all of its children on Stop.

    Yields as progress the bytes below `watch` out of `total`, as far as there is something to watch.
    Returns the exit status (negative: killed by that signal) and the last line of standard error.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=env,
            cwd=cwd,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                yield Step(min(_size_below(watch), total) if watch else 0, total, note, "B")
                cancel.wait(TICK_SECONDS)
        finally:
            _kill(child)
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return child.returncode, lines[-1][:300] if lines else ""


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()


def _size_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # a file may vanish or be renamed while it is looked at
            total += file.stat().st_size if file.is_file() else 0
    return total
