"""A session whose model lives in a process of its own, so that this process neither computes nor holds weights.

`WorkerSession` has the methods of `Session`. Loading starts a worker, unloading ends it, which gives back all of its
memory. A worker that dies, killed for memory or by a kernel's fault, costs the answer that it was working on.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

import psutil

from lowmem.errors import Cancelled, LowMemError, OutOfMemory
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.chat import ChatMessage
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.child import Child
from lowmem.machine.hardware import Hardware, probe
from lowmem.machine.memory_limits import share_budget_with
from lowmem.messages import join, msg
from lowmem.models.fetch import fetch
from lowmem.models.source import resolve_folder
from lowmem.planning.fallback import WHILE_LOADING, next_fallback
from lowmem.planning.plan import Plan
from lowmem.runtime import receipts
from lowmem.runtime.session import Session
from lowmem.runtime.worker import Call, Ended, Event, Stop

TICK_SECONDS = 0.05
STOP_SECONDS = 0.6
"""A worker that has not stopped loading after this is ended."""


class Worker:
    """The process of one model, as the process that started it sees it.

    Raises:
        LowMemError: the system does not start another process.
    """

    def __init__(self) -> None:
        try:
            self.child = Child("lowmem.runtime")
        except OSError as error:
            raise LowMemError(
                msg("A process for the model could not be started: {error}.", error=error.strerror or str(error)),
                msg("Close other programs, then load the model again."),
            ) from error
        self._answers: SimpleQueue[Event | Ended | None] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="lowmem-worker").start()

    @property
    def alive(self) -> bool:
        return self.child.process.poll() is None

    def send(self, message: Call | Stop | MemoryBudget) -> None:
        with suppress(OSError):  # a dead worker's silence says it
            self.child.input.write(pickle.dumps(message))
            self.child.input.flush()

    def answers(self, call: Call, cancel: CancelToken, *, patient: bool) -> Iterator[Event | Ended]:
        """Events of a call and its end.

        Args:
            patient: Stop waits until the worker has heard it; otherwise it ends the worker after `STOP_SECONDS`.

        Raises:
            WorkerDied: there is no more worker.
            Cancelled: the worker was ended.
        """
        self.send(call)
        ended = False
        try:
            for one in self._until_stopped(cancel, patient=patient):
                ended = isinstance(one, Ended)
                yield one
                if ended:
                    return
        finally:
            if not ended and self.alive:  # whoever listened has left
                stopped = CancelToken()
                stopped.set()
                with suppress(LowMemError):
                    for one in self._until_stopped(stopped, patient=patient):
                        if isinstance(one, Ended):
                            break

    def _until_stopped(self, cancel: CancelToken, *, patient: bool) -> Iterator[Event | Ended]:
        told = 0.0
        while True:
            if cancel.cancelled:
                if not told:
                    told = time.monotonic()
                    self.send(Stop())
                elif not patient and time.monotonic() - told > STOP_SECONDS:
                    self.end()
                    raise Cancelled()
            try:
                one = self._answers.get(timeout=TICK_SECONDS)
            except Empty:
                continue
            if one is None:
                self.child.wait()
                raise self.death()
            yield one

    def death(self) -> WorkerDied:
        """The error for a process that has ended."""
        cause = self.child.death(msg("model's process"))
        return WorkerDied(cause.message, cause.hint)

    def end(self) -> None:
        self.child.end()

    def resident_bytes(self) -> int:
        """RAM that the process holds."""
        with suppress(psutil.Error):
            return psutil.Process(self.child.pid).memory_info().rss
        return 0

    def _listen(self) -> None:
        output = self.child.output
        with suppress(Exception):  # the end of a process may cut a pickle anywhere
            while True:
                self._answers.put(pickle.load(output))
        self._answers.put(None)


class WorkerDied(OutOfMemory):
    """The model's process ended without an answer."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A model whose process died.

    Args:
        sentence: what happened, with its numbers.
        plan: as it was loaded.
        fallback: the next plan of the fallback chain; None at its end.
    """

    sentence: str
    plan: Plan
    fallback: Plan | None


class WorkerSession(Session):
    """`Session` for a model in a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._worker: Worker | None = None
        self._streamed_bytes = 0
        self._worker_children: tuple[int, ...] = ()
        self.lost: Lost | None = None
        """The model whose process died since the last load."""

    @property
    def plan(self) -> Plan | None:
        worker = self._worker
        if worker is not None and not worker.alive and self._lock.acquire(blocking=False):
            try:  # it died between two actions
                if self._worker is worker and self._plan is not None:
                    self._lose(self._plan, worker.death())
            finally:
                self._lock.release()
        return self._plan

    @property
    def streamed_bytes(self) -> int:
        return self._streamed_bytes

    def hardware(self) -> Hardware:
        found = probe()
        if self._worker is not None:
            return replace(found, runtime_bytes=self._overhead_bytes)
        return replace(found, runtime_bytes=found.process_bytes + found.runtime_bytes)

    def _load(self, plan: Plan, cancel: CancelToken, force: bool) -> Generator[Step, None, Receipt]:
        """Start a worker and load; a worker that dies is followed by one with the next plan of the fallback chain."""
        # Here, so that a download that fails or is stopped leaves the resident model alone.
        folder = yield from fetch(plan.spec, cancel)
        plan = replace(plan, spec=replace(plan.spec, source=resolve_folder(folder, plan.spec.ref)))
        self._end_worker()
        notes: list[str] = []
        while True:
            self._worker = worker = Worker()
            share_budget_with([worker.child.pid])
            call = Call(Session.load, (plan,), {"force": force})
            try:
                for event in self._exchange(call, cancel, patient=False):
                    if isinstance(event, Step):
                        yield event
            except WorkerDied as death:
                self._end_worker()
                lower = next_fallback(plan, WHILE_LOADING)
                if lower is None:
                    raise
                notes.append(join(" ", (death.message, lower.reason)))
                yield Step(0, 0, notes[-1])
                plan = lower
            except BaseException:
                self._end_worker()
                raise
            else:
                assert self._load_receipt is not None  # of the worker's session
                return replace(self._load_receipt, notes=(*notes, *self._load_receipt.notes))

    def unload(self) -> Receipt | None:
        with self._lock:
            plan, started, worker = self._plan, time.perf_counter(), self._worker
            if plan is None or worker is None:
                return None
            held = worker.resident_bytes()
            self._end_worker()
            self._last_receipt = receipts.unload_receipt(plan, time.perf_counter() - started, held, held)
            return self._last_receipt

    def run(
        self, action: Callable[..., Iterator[Any]], *arguments: Any, cancel: CancelToken | None = None, **options: Any
    ) -> Iterator[Any]:
        cancel = cancel or CancelToken()
        yield from self._turn(self._busy, cancel)
        try:
            self._planned()
            yield from self._exchange(Call(action, arguments, options), cancel, patient=True)
        except WorkerDied as death:
            raise self._lose(self._planned(), death) from death
        finally:
            self._done()

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        **settings: Any,
    ) -> Iterator[Step | Chunk | Receipt]:
        return self.run(Session.generate, prompt, options, cancel=cancel, **settings)

    def batch(
        self,
        prompts: Sequence[str],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        **settings: Any,
    ) -> Iterator[Step | Completion | Receipt]:
        return self.run(Session.batch, prompts, options, cancel=cancel, **settings)

    def set_budget(self, budget: MemoryBudget) -> None:
        """Move the resident model's budget, its cap included."""
        super().set_budget(budget)
        if self._worker is not None:
            self._worker.send(budget)

    def _exchange(self, call: Call, cancel: CancelToken, *, patient: bool) -> Generator[Any, None, None]:
        assert self._worker is not None  # set together with the plan
        for one in self._worker.answers(call, cancel, patient=patient):
            if isinstance(one, Event):
                self._busy, self._streamed_bytes = one.busy, one.streamed_bytes
                if one.children != self._worker_children:
                    self._worker_children = one.children
                    share_budget_with([self._worker.child.pid, *one.children])
                if isinstance(one.event, Receipt) and call.action in (Session.generate, Session.batch):
                    self._last_receipt = one.event  # before whoever receives it looks
                yield one.event
                continue
            state = one.state
            self._plan, self._overhead_bytes = state.plan, state.overhead_bytes
            self._load_receipt = state.load_receipt
            if state.last_receipt != self._last_receipt:
                self._last_receipt = state.last_receipt
            one.raise_failure()

    def _lose(self, plan: Plan, death: WorkerDied) -> OutOfMemory:
        """Forget a model whose process died; the error to raise."""
        self._end_worker()
        fallback = next_fallback(plan)
        self.lost = Lost(death.message, plan, fallback)
        return OutOfMemory(
            death.message,
            msg("Load it again, or with less memory: {reason}", reason=fallback.reason)
            if fallback
            else msg("Load it again, or choose a smaller model."),
        )

    def _end_worker(self) -> None:
        worker, self._worker = self._worker, None
        self._plan = self._load_receipt = self.lost = None
        self._streamed_bytes, self._worker_children = 0, ()
        share_budget_with([])
        if worker is not None:
            worker.end()
