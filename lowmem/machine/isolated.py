"""Run a job in a child process: its memory is freed when it ends, and its peak is measured alone.

A job is a generator function of `Step`s whose return value is JSON-serializable. Parent and child exchange
JSON lines: the request on the child's standard input, which stays open so that the child notices when its
parent dies, and steps followed by a result or an error on its standard output. Anything else the child
prints goes to its standard error. The parent imports no torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.background import interruptible
from lowmem.errors import DoesNotFit, file_errors
from lowmem.events import CancelToken, Receipt, Step, WithResult
from lowmem.machine import baseline
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.cap import cap_memory, cap_note
from lowmem.machine.child import Child, Failure, claim_output, die_with_parent, offer_to_be_killed_first
from lowmem.machine.monitor import PeakMeter
from lowmem.messages import msg, packed, unpacked
from lowmem.units import format_bytes

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
        note = cap_note()
        return replace(receipt, measured=measured, notes=(*receipt.notes, note) if note else receipt.notes)


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
        DoesNotFit: the budget does not even hold the libraries that every job loads.
        OutOfMemory: also when the child was killed, or died without a result.
        Cancelled: the child has been killed.
        RuntimeError: the job failed with a bug; the message is its traceback.
    """
    cancel = cancel or CancelToken()
    cancel.check()
    _refuse_too_small(job, budget)
    request = {"job": job, "arguments": dict(arguments), "budget": budget.as_dict()}
    started = time.perf_counter()
    with file_errors(msg("No process could be started")):
        child = Child("lowmem.jobs", hub=True)
    try:
        answer = yield from _answers(child, json.dumps(request), cancel)
        child.wait()
        if answer is None:
            raise child.death(msg("job"))
    finally:
        child.end()
    yield Finished(_value(answer, job), time.perf_counter() - started, answer["peak"], child.kernel_peak)


def _refuse_too_small(job: str, budget: MemoryBudget) -> None:
    """Every job of `lowmem.jobs` loads torch, whose code no cap holds back: it is mapped from files."""
    needed = baseline.runtime_bytes()
    if budget.ram is not None and budget.ram < needed and ":" not in job:
        raise DoesNotFit(
            msg(
                "{budget} of RAM are left for a process that takes {needed} before it begins.",
                budget=format_bytes(budget.ram),
                needed=format_bytes(needed),
            ),
            msg("Raise the budget, or unload the model first."),
        )


def _answers(child: Child, request: str, cancel: CancelToken) -> Generator[Step, None, dict[str, Any] | None]:
    """Forward steps; returns the final answer, None if there is none."""
    with suppress(BrokenPipeError):
        child.input.write(request.encode() + b"\n")
        child.input.flush()
    for line in interruptible(child.output, cancel):
        try:
            answer = json.loads(line, object_hook=unpacked)
        except ValueError:
            return None  # cut off in the middle of a line
        if "step" not in answer:
            return answer
        yield Step(*answer["step"])
    return None


def _value(answer: dict[str, Any], job: str) -> Any:
    if "failure" in answer:
        raise Failure(*answer["failure"]).exception(job)
    return answer["result"]


def serve(find: Callable[[str], Callable[..., JobEvents]]) -> None:
    """In the child: read the request, run the job that `find` returns for its name, and answer."""
    channel = claim_output()

    def say(answer: dict[str, Any]) -> None:
        channel.write(json.dumps(packed(answer)).encode() + b"\n")
        channel.flush()

    with open(0, "rb", closefd=False) as requests:
        request = json.loads(requests.readline())
    die_with_parent()
    offer_to_be_killed_first()
    budget = MemoryBudget(**request["budget"])
    # The outermost meter: it keeps the peaks that inner meters reset.
    with PeakMeter(budget) as meter:
        answer = _run(find, request, meter, budget, say)
    say({**answer, "peak": meter.peak})
    # Python takes over a second to tear torch down; the system does it at once.
    sys.stderr.flush()
    os._exit(0)


def _run(
    find: Callable[[str], Callable[..., JobEvents]],
    request: dict[str, Any],
    meter: PeakMeter,
    budget: MemoryBudget,
    say: Any,
) -> dict[str, Any]:
    arguments = request["arguments"]
    if threads := arguments.pop("threads", 0):
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch, not imported yet, reads this when it is
    try:
        job = find(request["job"])
        cap_memory(budget)  # not before: what the libraries map for later, 32 MB a core, is a reserve
        running = WithResult(job(**arguments))
        meter.check()
        for step in running:
            say({"step": [step.done, step.total, step.note, step.unit]})
            meter.check()
        return {"result": running.result}
    except Exception as error:
        return {"failure": Failure.of(error, _ran_out(meter, budget))}


def _ran_out(meter: PeakMeter, budget: MemoryBudget) -> str:
    held = format_bytes(meter.peak.get("vram") or meter.peak["ram"])
    if budget.ram is None:
        return msg("Memory ran out at {held}.", held=held)
    return msg(
        "The next allocation would have taken more than the budget of {limit}; {held} were in use.",
        limit=format_bytes(budget.ram),
        held=held,
    )
