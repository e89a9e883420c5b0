"""A process that owns one resident model: `python -m lowmem.runtime`, started by `runtime.remote`.

Calls arrive on standard input and are answered on standard output, one after the other, as pickles: both ends are this
program. A call names a function whose first argument is the worker's `Session` and which is a generator of events.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from lowmem.events import CancelToken, Chunk, Receipt
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.child import Failure, claim_output, offer_to_be_killed_first
from lowmem.machine.memory_limits import children, share_budget_with
from lowmem.messages import msg
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session

FLUSH_SECONDS = 0.1
"""Text of fast tokens is sent this often: every wake-up of the page takes time from a core that decodes."""


@dataclass(frozen=True, slots=True)
class Call:
    """Work for the worker's session.

    Args:
        action: a function of a module or of a class, called with the session, `arguments`, `options` and `cancel`.
    """

    action: Callable[..., Iterator[Any]]
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the call that is being answered."""


@dataclass(frozen=True, slots=True)
class State:
    """What the twin mirrors of the worker's session."""

    plan: Plan | None
    load_receipt: Receipt | None
    last_receipt: Receipt | None
    overhead_bytes: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event of an action, with the session's current action, the bytes that it has streamed so far, and the processes
    that it has started and counts as its own."""

    event: Any
    busy: str
    streamed_bytes: int
    children: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a call, with the exception that ended it."""

    state: State
    failure: Failure | None = None

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure.exception("the model's process")


def answer(session: Session, call: Call, cancel: CancelToken) -> Iterator[Event | Ended]:
    """Run a call on `session`: its events, and its end with the session's state."""
    failure = None
    try:
        for event in call.action(session, *call.arguments, cancel=cancel, **call.options):
            yield Event(event, session.busy, session.streamed_bytes, children())
    except Exception as error:
        failure = Failure.of(error, msg("Memory ran out."))
    yield Ended(state_of(session), failure)


def state_of(session: Session) -> State:
    return State(session.plan, session.load_receipt, session.last_receipt, session.overhead_bytes)


def main() -> None:
    channel = claim_output()
    offer_to_be_killed_first()
    share_budget_with([os.getppid()])
    session, calls = Session(capped=True), SimpleQueue[tuple[Call, CancelToken]]()
    threading.Thread(target=_listen, args=(session, calls), daemon=True, name="lowmem-calls").start()
    flushed = 0.0
    while True:
        call, cancel = calls.get()
        for one in answer(session, call, cancel):
            pickle.dump(one, channel)
            now = time.monotonic()
            if now - flushed > FLUSH_SECONDS or not (isinstance(one, Event) and isinstance(one.event, Chunk)):
                channel.flush()
                flushed = now


def _listen(session: Session, calls: SimpleQueue[tuple[Call, CancelToken]]) -> None:
    """Read calls and stops. The end of the input is the end of the parent, so of this process too."""
    token = CancelToken()
    try:
        with open(0, "rb", closefd=False) as requests:
            while True:
                match pickle.load(requests):
                    case Call() as call:
                        token = CancelToken()
                        calls.put((call, token))
                    case Stop():
                        token.set()
                    case MemoryBudget() as budget:
                        session.set_budget(budget)
    finally:
        os._exit(0)
