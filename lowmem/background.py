"""Running blocking work so that Stop interrupts it: an iterator in a thread, a command in a child process, a lock.

A blocked socket or a child process cannot check a `CancelToken`; the functions here do, five times a second.
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
    """Yield `items`, which a daemon thread produces; raises `Cancelled` within a tick, even while waiting for the next.

    Raises:
        TimeoutError: the iterator has not ended after `seconds`.
    """
    deadline = time.monotonic() + seconds
    results: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(_QUEUED)
    stop = threading.Event()
    threading.Thread(target=_pump, args=(items, results, stop), daemon=True, name="lowmem-io").start()
    try:
        while True:
            cancel.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            try:
                kind, item = results.get(timeout=TICK_SECONDS)
            except queue.Empty:
                continue
            if kind == "end":
                return
            if isinstance(item, BaseException):
                raise item
            yield cast(T, item)
    finally:
        stop.set()


def _pump(
    items: Iterable[T], results: queue.Queue[tuple[str, T | BaseException | None]], stop: threading.Event
) -> None:
    def put(kind: str, item: T | BaseException | None = None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                results.put((kind, item), timeout=TICK_SECONDS)
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
    """Return the result of a blocking call; raises `Cancelled` within a tick when Stop is pressed."""
    return next(interruptible((call() for _ in range(1)), cancel))


@contextlib.contextmanager
def locked(target: Path, cancel: CancelToken, note: str) -> Iterator[Iterator[Step]]:
    """Lock `target`. The block must first iterate over the steps that it receives, which wait for the lock.

    Args:
        note: progress message while another process or thread holds the lock.
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
    """Run `command` without output; Stop kills it and all of its children.

    Args:
        watch: folder whose size in bytes, out of `total`, is the progress that is yielded.

    Returns:
        the exit status (negative: killed by that signal) and the last line of standard error.
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
        with contextlib.suppress(OSError):  # a file may be deleted or renamed in the meantime
            total += file.stat().st_size if file.is_file() else 0
    return total
