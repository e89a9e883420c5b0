"""Run a job in a child process: its memory is freed when it ends, and its peak is measured alone.

A job is a generator function of `Step`s whose return value is JSON-serializable. Parent and child exchange
JSON lines: the request on the child's standard input, which stays open so that the child notices when its
parent dies, and steps followed by a result or an error on its standard output. Anything else the child
prints goes to its standard error. The parent imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import lowmem.errors as errors
from lowmem.background import interruptible
from lowmem.errors import LowMemError, OutOfMemory
from lowmem.events import CancelToken, Receipt, Step, WithResult
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.monitor import PeakMeter
from lowmem.machine.oom import is_out_of_memory
from lowmem.messages import msg, packed, unpacked
from lowmem.settings import without_lent_gpu
from lowmem.units import format_bytes

log = logging.getLogger("lowmem.isolated")

TERMINATE_SECONDS = 0.5
"""Time between SIGTERM and SIGKILL."""

EXIT_SECONDS = 10.0
"""Time for a child to exit after its result, before it is terminated."""

_LESS_MEMORY = msg("Close other programs, or choose a smaller model, fewer bits or a shorter text.")

JobEvents = Generator[Step, None, Any]
"""What a job yields and returns."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a job, its time and peak memory.

    Args:
        value: what the job returned.
        seconds: from the start of the process to its end.
        peak_bytes: "ram" and, where a GPU was used, "vram", seen from inside: the high-water mark of
            the resident set (VmHWM) and of torch's tensors.
        kernel_peak_bytes: `ru_maxrss` as the kernel reports it with the process's end, 0 where it does
            not. Until exec a child is its parent's copy and its pages count, so it says something only
            where it is above what the parent holds.
    """

    value: Any
    seconds: float
    peak_bytes: dict[str, int] = field(default_factory=dict)
    kernel_peak_bytes: int = 0

    def receipt(self) -> Receipt:
        """The receipt that the job returned as a dict, with the measured memory of its whole process."""
        receipt = Receipt.from_dict(self.value)
        measured = {memory: count for memory, count in self.peak_bytes.items() if memory in receipt.predicted}
        return replace(receipt, measured=measured)


def run_isolated(
    job: str, arguments: Mapping[str, Any], cancel: CancelToken | None = None, budget: MemoryBudget = UNLIMITED
) -> Iterator[Step | Finished]:
    """Run a job of `lowmem.jobs` (or "package.module:function") with JSON-able keyword `arguments` in a new process.

    Yields the job's steps and, last, `Finished`. The child ends within a second of Stop, with this
    generator, and with this process.

    Args:
        arguments: of the job; every job takes "threads", the cores for torch to use (0 for all).
        budget: the most memory the child may hold, checked between the job's steps.

    Raises:
        LowMemError: the job raised it; kind, message and hint are the same.
        OutOfMemory: also when the child was killed, or died without a result.
        Cancelled: the child has been killed.
        RuntimeError: the job failed with a bug; the message is its traceback.
    """
    cancel = cancel or CancelToken()
    cancel.check()
    request = {"job": job, "arguments": dict(arguments), "budget": budget.as_dict()}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as printed:
        child = _start(printed)
        try:
            answer = yield from _answers(child, json.dumps(request), cancel)
            kernel_peak = _reap(child, EXIT_SECONDS if answer else None)
        finally:
            _end(child)
        if answer is None:
            raise _death(child.returncode, kernel_peak, _tail(printed))
        yield Finished(_value(answer, job), time.perf_counter() - started, answer["peak"], kernel_peak)


def _start(printed: IO[bytes]) -> subprocess.Popen[str]:
    # The child finds every module that this process would, wherever both were started from.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-m", "lowmem.jobs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=printed,
        encoding="utf-8",
        env={**os.environ, **without_lent_gpu(), "PYTHONPATH": path},
        start_new_session=True,
    )


def _answers(
    child: subprocess.Popen[str], request: str, cancel: CancelToken
) -> Generator[Step, None, dict[str, Any] | None]:
    """Forward steps; returns the final answer, None if there is none."""
    assert child.stdin is not None  # both are pipes
    assert child.stdout is not None
    with suppress(BrokenPipeError):
        child.stdin.write(request + "\n")
        child.stdin.flush()
    for line in interruptible(child.stdout, cancel):
        try:
            answer = json.loads(line, object_hook=unpacked)
        except ValueError:
            return None  # cut off in the middle of a line
        if "step" not in answer:
            return answer
        yield Step(*answer["step"])
    return None


def _value(answer: dict[str, Any], job: str) -> Any:
    if "bug" in answer:
        raise RuntimeError(f"{job} failed:\n{answer['bug']}")
    if "error" in answer:
        kind = getattr(errors, answer["error"], LowMemError)
        raise kind(answer["message"], answer["hint"])
    return answer["result"]


def _reap(child: subprocess.Popen[str], seconds: float | None) -> int:
    """Wait at most `seconds` for the child to exit; returns its peak resident set in bytes as the kernel reports it, or 0."""
    if not hasattr(os, "wait4"):
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        return 0
    deadline = time.monotonic() + (EXIT_SECONDS if seconds is None else seconds)
    while time.monotonic() < deadline:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            child.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        time.sleep(0.01)
    return 0


def _end(child: subprocess.Popen[str]) -> None:
    """Terminate the child and its children unless it has exited; close its pipes."""
    if child.returncode is None:
        _signal(child, getattr(signal, "SIGTERM", 15))
        with suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATE_SECONDS)
        if child.returncode is None:
            _signal(child, getattr(signal, "SIGKILL", 9))
            child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _signal(child: subprocess.Popen[str], number: int) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, number)
    else:
        child.kill()


def _tail(printed: IO[bytes]) -> str:
    printed.seek(0, os.SEEK_END)
    printed.seek(max(0, printed.tell() - 2000))
    return printed.read().decode("utf-8", "replace").strip()


def _death(status: int, kernel_peak: int, printed: str) -> OutOfMemory:
    """The error for a child that died without a result: nearly always it was killed for memory."""
    log.warning("a job ended without a result, status %s: %s", status, printed)
    held = msg(", when it had used up to {kernel_peak}", kernel_peak=format_bytes(kernel_peak)) if kernel_peak else ""
    if status == -9:
        return OutOfMemory(
            msg("The system killed the job{held}: the machine's memory ran out.", held=held), _LESS_MEMORY
        )
    how = msg("signal {status}", status=-status) if status < 0 else msg("status {status}", status=status)
    return OutOfMemory(
        msg("The job ended without a result ({how}){held}; most likely it ran out of memory.", how=how, held=held),
        _LESS_MEMORY,
    )


def serve(find: Callable[[str], Callable[..., JobEvents]]) -> None:
    """In the child: read the request, run the job that `find` returns for its name, and answer."""
    channel = _claim_output()

    def say(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(packed(answer)) + "\n")
        channel.flush()

    with open(0, encoding="utf-8", closefd=False) as requests:
        request = json.loads(requests.readline())
    threading.Thread(target=_die_with_parent, daemon=True, name="lowmem-parent").start()
    _offer_to_be_killed_first()
    # The outermost meter: it keeps the peaks that inner meters reset.
    with PeakMeter(MemoryBudget(**request["budget"])) as meter:
        answer = _run(find, request, meter, say)
    say({**answer, "peak": meter.peak})
    # Python takes over a second to tear torch down; the system does it at once.
    sys.stderr.flush()
    os._exit(0)


def _run(
    find: Callable[[str], Callable[..., JobEvents]], request: dict[str, Any], meter: PeakMeter, say: Any
) -> dict[str, Any]:
    arguments = request["arguments"]
    if threads := arguments.pop("threads", 0):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch, not imported yet, reads this when it is
    try:
        running = WithResult(find(request["job"])(**arguments))
        meter.check()
        for step in running:
            say({"step": [step.done, step.total, step.note, step.unit]})
            meter.check()
        return {"result": running.result}
    except LowMemError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except Exception as error:
        if not is_out_of_memory(error):
            return {"bug": traceback.format_exc()}
        held = format_bytes(meter.peak.get("vram") or meter.peak["ram"])
        return {"error": "OutOfMemory", "message": msg("Memory ran out at {held}.", held=held), "hint": _LESS_MEMORY}


def _claim_output() -> IO[str]:
    """Make standard output the channel to the parent, and redirect printing to standard error."""
    channel = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(channel, "w", encoding="utf-8")


def _die_with_parent() -> None:
    # A raw read: reading `sys.stdin` would hold its lock, which interpreter shutdown needs.
    while os.read(0, 1):
        pass
    os._exit(1)


def _offer_to_be_killed_first() -> None:
    """Make the kernel's OOM killer prefer this process to the app."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
