"""A child process that speaks over its standard input and output, and dies with this process.

The child's standard input stays open while this process lives, so its end tells the child that its parent has died. What
the child prints goes to its standard error, which a file collects for the case that it dies.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from lowmem import errors
from lowmem.errors import LESS_MEMORY, LowMemError, OutOfMemory, file_error, is_out_of_memory
from lowmem.messages import msg
from lowmem.settings import child_environment
from lowmem.units import format_bytes

log = logging.getLogger("lowmem.child")

TERMINATE_SECONDS = 0.5
"""Time between SIGTERM and SIGKILL."""

EXIT_SECONDS = 10.0
"""Time for a child to exit on its own, before it is terminated."""


class Child:
    """`python -m MODULE`, a process group of its own with binary pipes.

    Args:
        module: run as the child's main program. It must call `claim_output` before it prints anything.
        hub: it may fetch from the hub, see `settings.child_environment`.

    Raises:
        OSError: the system does not start another process.
    """

    def __init__(self, module: str, *, hub: bool = False) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  closed by `end`
        # The child finds every module that this process would, wherever both were started from.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=child_environment(hub=hub) | {"PYTHONPATH": path},
            start_new_session=True,
        )
        self.kernel_peak = 0
        """Peak resident set in bytes as the kernel reports it with the process's end, 0 where it does not. Until exec a
        child is its parent's copy and its pages count, so it says something only where it is above what the parent holds."""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def input(self) -> IO[bytes]:
        assert self.process.stdin is not None  # a pipe
        return self.process.stdin

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None  # a pipe
        return self.process.stdout

    def wait(self, seconds: float = EXIT_SECONDS) -> None:
        """Wait at most `seconds` for the child to exit."""
        if self.process.returncode is not None:
            return
        if not hasattr(os, "wait4"):
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
            return
        deadline = time.monotonic() + seconds
        while True:
            try:
                pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            except ChildProcessError:  # another thread was faster
                self.process.poll()
                return
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                self.kernel_peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                return
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def end(self) -> None:
        """Terminate the child and its children unless it has exited, and close its pipes."""
        if self.process.returncode is None:
            self._signal(getattr(signal, "SIGTERM", 15))
            self.wait(TERMINATE_SECONDS)
        if self.process.returncode is None:
            self._signal(getattr(signal, "SIGKILL", 9))
            self.process.wait()
        for stream in (self.input, self.output, self._printed):
            with suppress(OSError):
                stream.close()

    def _signal(self, number: int) -> None:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)
        else:
            self.process.kill()

    def death(self, what: str) -> OutOfMemory:
        """The error for a child that died without an answer: nearly always it was killed for memory. Call after `wait`.

        Args:
            what: it is to people, "job".
        """
        status = self.process.returncode
        log.warning("a child process ended without an answer, status %s: %s", status, self._tail())
        peak = self.kernel_peak
        held = msg(", when it had used up to {kernel_peak}", kernel_peak=format_bytes(peak)) if peak else ""
        if status == -9:
            return OutOfMemory(
                msg(
                    "The system killed the {what}{held}; most likely the machine's memory ran out.",
                    what=what,
                    held=held,
                ),
                LESS_MEMORY,
            )
        how = (
            msg("signal {status}", status=-status)
            if status is not None and status < 0
            else msg("status {status}", status=status)
        )
        return OutOfMemory(
            msg(
                "The {what} ended without a result ({how}){held}; most likely it ran out of memory.",
                what=what,
                how=how,
                held=held,
            ),
            LESS_MEMORY,
        )

    def _tail(self) -> str:
        self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, self._printed.tell() - 2000))
        return self._printed.read().decode("utf-8", "replace").strip()


class Failure(NamedTuple):
    """An exception on its way from a child to its parent.

    Args:
        kind: the name of a class of `lowmem.errors`, or "bug" with a traceback as the message.
    """

    kind: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: Exception, out_of_memory: str) -> Failure:
        """The exception being handled; `out_of_memory` is the sentence for those that mean it."""
        if isinstance(error, LowMemError):
            return cls(type(error).__name__, error.message, error.hint)
        if is_out_of_memory(error):
            return cls("OutOfMemory", out_of_memory, LESS_MEMORY)
        if isinstance(error, OSError):
            return cls.of(file_error(error, msg("The work was not finished")), out_of_memory)
        return cls("bug", traceback.format_exc())

    def exception(self, what: str) -> Exception:
        """For the parent to raise; `what` failed where it was a bug."""
        if self.kind == "bug":
            return RuntimeError(f"{what} failed:\n{self.message}")
        kind: type[LowMemError] = getattr(errors, self.kind, LowMemError)
        return kind(self.message, self.hint)


def claim_output() -> BinaryIO:
    """In the child: make standard output the channel to the parent, and redirect printing to standard error."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(channel, "wb")


def offer_to_be_killed_first() -> None:
    """In the child: make the kernel's OOM killer prefer this process to the app."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def die_with_parent() -> None:
    """In the child: read standard input, on which nothing more is expected, in a thread; its end ends this process."""
    threading.Thread(target=_until_closed, daemon=True, name="lowmem-parent").start()


def _until_closed() -> None:
    # A raw read: reading `sys.stdin` would hold its lock, which interpreter shutdown needs.
    while os.read(0, 1):
        pass
    os._exit(1)
