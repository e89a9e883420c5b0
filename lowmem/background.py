"""Background work that Stop interrupts: calls and iterators in threads, a command in a child process, a lock.

A blocked socket or a child process cannot check a `CancelToken`; the functions here do, five times a second.

Threads are reused. Near a cap on memory a new thread may get none, and `threading.Thread.start` waits for ever for a thread that
died of MemoryError before it said that it runs. So a process starts its threads before its cap tightens (`keep_idle`), and `_thread`
starts them, where the wait for an answer ends: without one it is OutOfMemory.
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from lowmem.errors import OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.messages import msg
from lowmem.settings import child_environment

T = TypeVar("T")
P = ParamSpec("P")

TICK_SECONDS = 0.2
START_SECONDS = 5.0
"""Time for a new thread to say that it runs; on a busy machine it takes milliseconds."""

_RETRY_SECONDS = 0.01
_QUEUED = 64


_Call = tuple[Future[Any], Callable[[], Any]]
_Calls = SimpleQueue[_Call | None]


class _Helper:
    """A thread that runs calls, one after the other, for as long as the process lives.

    Raises:
        OutOfMemory: there is no memory for it.
    """

    def __init__(self) -> None:
        self.calls: _Calls = SimpleQueue()
        self._starting = _thread.allocate_lock()
        self._starting.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except (RuntimeError, MemoryError) as error:  # no memory for its stack
            raise _no_thread() from error
        if not self._starting.acquire(timeout=START_SECONDS):
            raise _no_thread()

    def _run(self) -> None:
        self._starting.release()
        # Idle before the result is there: whoever waits for that finds this thread afterwards.
        _serve(self.calls, lambda: _idle.append(self))


_idle: list[_Helper] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a fork has none of its parent's threads


def _helper() -> _Helper:
    with contextlib.suppress(IndexError):
        return _idle.pop()
    return _Helper()


def _no_thread() -> OutOfMemory:
    return OutOfMemory(
        msg("There is no memory left for another thread."),
        msg("Use a shorter context, fewer bits, a smaller batch or a larger budget."),
    )


def _serve(calls: _Calls, done: Callable[[], None] = lambda: None) -> None:
    """Run calls until there is a None; `done` follows each. No call is lost where memory runs out."""
    call = None
    while True:
        try:
            call = call or calls.get()
            if call is None:
                return
            _settle(*call, done)
            call = None
        except MemoryError:
            time.sleep(_RETRY_SECONDS)


def _settle(future: Future[T], call: Callable[[], T], done: Callable[[], None]) -> None:
    """Give `future` the outcome of `call`. A MemoryError comes from before the call."""
    if not future.set_running_or_notify_cancel():
        return
    error: BaseException | None = None
    try:
        result = call()
    except BaseException as raised:
        error = raised
    with contextlib.suppress(MemoryError):
        done()
    while True:
        try:
            if future.done():
                break
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
        except MemoryError:
            time.sleep(_RETRY_SECONDS)
    del future, call, error  # which refer to each other by the traceback


def keep_idle(count: int) -> None:
    """Have at least `count` threads ready for `in_background`."""
    _idle.extend([_helper() for _ in range(count)])


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Call `function` in a daemon thread: an idle one, or a new one if there is none.

    Raises:
        OutOfMemory: there is no memory for a new thread.
    """
    future: Future[T] = Future()
    _helper().calls.put((future, functools.partial(function, *args, **kwargs)))
    return future


class ThreadPool(Executor):
    """Threads that share a queue of calls; all of them run from the start.

    Args:
        prepare: is called in every thread first.

    Raises:
        OutOfMemory: there is no memory for a new thread.
    """

    def __init__(self, count: int, prepare: Callable[[], None] = lambda: None) -> None:
        self._calls: _Calls = SimpleQueue()
        self._threads: list[Future[None]] = []
        try:
            for _ in range(count):
                self._threads.append(in_background(_prepare_and_serve, prepare, self._calls))
        except BaseException:
            self.shutdown(wait=False)
            raise

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once they have run what was submitted. Idempotent."""
        while cancel_futures:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                call[0].cancel()
        for _ in self._threads:
            self._calls.put(None)
        if wait:
            wait_for(self._threads)


def _prepare_and_serve(prepare: Callable[[], None], calls: _Calls) -> None:
    prepare()
    _serve(calls)


def interruptible(items: Iterable[T], cancel: CancelToken, seconds: float = math.inf) -> Iterator[T]:
    """Yield `items`, which a background thread produces; raises `Cancelled` within a tick, even while waiting for the next.

    Raises:
        TimeoutError: the iterator has not ended after `seconds`.
        OutOfMemory: there is no memory for a new thread.
    """
    deadline = time.monotonic() + seconds
    results: queue.Queue[T | _End] = queue.Queue(_QUEUED)
    stop = threading.Event()
    producer = in_background(_pump, items, results, stop)
    try:
        while True:
            cancel.check()
            if time.monotonic() > deadline:
                raise TimeoutError
            try:
                item = results.get(timeout=TICK_SECONDS)
            except queue.Empty:
                if not producer.done():  # it has no end to put in the queue where memory has run out
                    continue
                item = _END
            if isinstance(item, _End):
                return producer.result()
            yield item
    finally:
        stop.set()


class _End:
    """The end of a queue of results."""


_END = _End()


def _pump(items: Iterable[T], results: queue.Queue[T | _End], stop: threading.Event) -> None:
    def put(item: T | _End) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                results.put(item, timeout=TICK_SECONDS)
                return

    try:
        for item in items:
            put(item)
            if stop.is_set():
                break
    finally:
        put(_END)
        if isinstance(items, Generator):
            items.close()


def stoppable(call: Callable[[], T], cancel: CancelToken) -> T:
    """Return the result of a blocking call; raises `Cancelled` within a tick when Stop is pressed."""
    cancel.check()
    running = in_background(call)
    while not running.done():
        wait_for([running], TICK_SECONDS)
        cancel.check()
    return running.result()


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


_SUPERVISOR = """
import os, signal, subprocess, sys, threading

def end_with_parent():
    os.read(0, 1)  # returns once the other end of the pipe is closed, which a killed process does too
    os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else (child.kill(), os._exit(1))

child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=end_with_parent, daemon=True).start()
status = child.wait()
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""
"""Runs a command that knows nothing of its parent, and ends it with the parent."""


def end_with_parent() -> None:
    """In a child on Linux: let the kernel kill this process when the thread that started it ends, see prctl(2)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def limit_process(nbytes: int, seconds: int = 0) -> None:
    """In a child on Linux: let allocations fail once this process holds `nbytes` more than now, see setrlimit(2).

    Args:
        seconds: of a processor, after which the kernel ends the process; 0 for no limit.
    """
    if sys.platform == "linux":
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        for kind, limit in ((resource.RLIMIT_DATA, held + nbytes), (resource.RLIMIT_CPU, seconds)):
            most = resource.getrlimit(kind)[1]
            if limit:
                resource.setrlimit(kind, (limit if most < 0 else min(limit, most), most))


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
    """Run `command` without output; Stop, and the end of this process, kill it and all of its children.

    Args:
        watch: folder whose size in bytes, out of `total`, is the progress that is yielded.
        env: variables beside those of `settings.child_environment`.

    Returns:
        the exit status (negative: killed by that signal) and the last line of standard error.
    """
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _SUPERVISOR, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=child_environment() | dict(env or {}),
            cwd=cwd,
            start_new_session=True,
        )
        try:
            while child.poll() is None:
                yield Step(min(_size_below(watch), total) if watch else 0, total, note, "B")
                cancel.wait(TICK_SECONDS)
        finally:
            _kill(child)
            assert child.stdin is not None  # a pipe
            child.stdin.close()
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
