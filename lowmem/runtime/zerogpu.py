"""ZeroGPU Spaces, where a GPU is attached for one action at a time.

The app's own process has no GPU. A function decorated with `spaces.GPU` runs in a worker that has one for a requested
number of seconds; its arguments and what it yields are pickled, and nothing else comes back. So it takes the place of
`runtime.remote.Worker`: loading a model only downloads and plans it; each call loads it in its worker, which keeps it
for the next call if it lives that long.
The seconds are estimated from the plan, since visitors have a small daily quota. Needs the package `spaces`, which must
be imported before torch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import spaces

from lowmem.errors import Cancelled, LowMemError, NotAllowed
from lowmem.events import CancelToken, Chunk, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.models.fetch import fetch
from lowmem.models.source import resolve_folder
from lowmem.planning.plan import Plan
from lowmem.runtime import receipts
from lowmem.runtime.remote import WorkerSession
from lowmem.runtime.session import Session
from lowmem.runtime.worker import Call, Ended, Event, answer
from lowmem.settings import gpu_is_attached

# Half an RTX Pro 6000 Blackwell, estimated cautiously: unused seconds are not charged.
START_SECONDS = 15.0  # torch, CUDA and the first kernels, from a cold disk
READ_BYTES_PER_SECOND = 0.8e9
VRAM_BYTES_PER_SECOND = 500e9
SECONDS_PER_LAYER = 1e-3  # of one pass: Python and the starts of its kernels
PREFILL_TOKENS_PER_SECOND = 2000.0
CHARACTERS_PER_TOKEN = 3
PROMPTS_AT_ONCE = 8
SAFETY = 1.5
LONGEST_SECONDS = 110
"""Anonymous visitors have 120 seconds per day, and a request for more than they have left is refused."""
GRACE_SECONDS = 5.0  # the worker starts before its clock does

_worker_session: Session | None = None
"""The worker's session; always None in the app's own process."""


def estimated_seconds(plan: Plan, call: Call) -> int:
    """GPU seconds to request for loading `plan` and a call, with a safety margin; at most `LONGEST_SECONDS`."""
    if not call.arguments or not isinstance(call.arguments[-1], GenerateOptions):
        return LONGEST_SECONDS
    prompt, options = call.arguments[0], call.arguments[-1]
    prompts = len(prompt) if call.action is Session.batch else 1
    turns = math.ceil(prompts / (call.options.get("batch_size") or PROMPTS_AT_ONCE))
    load = START_SECONDS + plan.spec.size_on_disk / READ_BYTES_PER_SECOND
    read = len(str(prompt)) / CHARACTERS_PER_TOKEN / PREFILL_TOKENS_PER_SECOND
    token = plan.spec.layers * SECONDS_PER_LAYER + plan.main.share("weights") / VRAM_BYTES_PER_SECOND
    return min(LONGEST_SECONDS, math.ceil(SAFETY * (load + read + turns * options.max_new_tokens * token)))


@spaces.GPU(duration=estimated_seconds)
def lent(plan: Plan, call: Call) -> Iterator[Event | Ended]:
    """Runs in the worker: load the plan unless it is loaded, then answer the call. Ends before the GPU is detached."""
    global _worker_session
    gpu_is_attached()
    token = CancelToken()
    timer = threading.Timer(estimated_seconds(plan, call) - GRACE_SECONDS, token.set)
    timer.daemon = True
    timer.start()
    started = time.perf_counter()
    _worker_session = session = _worker_session or Session()
    try:
        if session.plan != plan:
            for one in answer(session, Call(Session.load, (plan,)), token):
                if isinstance(one, Ended) and one.failure:
                    yield one
                    return
                if isinstance(one, Event) and isinstance(one.event, Step):
                    yield one
        gpu, loading = _real_memory(), time.perf_counter() - started
        for one in answer(session, call, token):
            if isinstance(one, Event) and isinstance(one.event, Receipt):
                one = replace(one, event=_with_gpu(one.event, gpu, loading, token.cancelled))
            yield one
    finally:
        timer.cancel()


def _real_memory() -> dict[str, Any]:
    """Name and memory of the worker's GPU; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu": torch.cuda.get_device_name(), "gpu_total_bytes": total, "gpu_free_bytes": free}


def _with_gpu(receipt: Receipt, gpu: dict[str, Any], loading: float, out_of_time: bool) -> Receipt:
    notes = (msg("Loading the model took {loading:.1f} s of GPU time.", loading=loading),) if loading > 1 else ()
    if out_of_time:
        notes = (*notes, msg("The GPU time for this action is used up."))
    details = receipt.details | gpu | {"loading_seconds": loading}
    return replace(receipt, notes=(*receipt.notes, *notes), details=details)


class LentSession(WorkerSession):
    """The session of a ZeroGPU Space. A model on the CPU has a worker of its own, as everywhere."""

    def _load(self, plan: Plan, cancel: CancelToken, force: bool) -> Generator[Step, None, Receipt]:
        if plan.place.kind == "cpu":
            return (yield from super()._load(plan, cancel, force))
        started = time.perf_counter()
        folder = yield from fetch(plan.spec, cancel)
        yield Step(0, 0, msg("A GPU is attached with the first answer"))
        self._end_worker()
        self._plan = replace(plan, spec=replace(plan.spec, source=resolve_folder(folder, plan.spec.ref)))
        self._overhead_bytes = plan.hardware.runtime_bytes
        return receipts.load_receipt(self._plan, time.perf_counter() - started, {}, [], folder)

    def run(
        self, action: Callable[..., Iterator[Any]], *arguments: Any, cancel: CancelToken | None = None, **options: Any
    ) -> Iterator[Any]:
        if self._worker is None and self._plan is not None:
            return self._lent(Call(action, arguments, options), cancel or CancelToken())
        return super().run(action, *arguments, cancel=cancel, **options)

    def unload(self) -> Receipt | None:
        if self._worker is not None:
            return super().unload()
        with self._lock:
            plan = self._plan
            self._end_worker()
            self._last_receipt = receipts.unload_receipt(plan, 0.0, 0, 0) if plan else self._last_receipt
            return self._last_receipt if plan else None

    def _lent(self, call: Call, cancel: CancelToken) -> Iterator[Any]:
        """Forward what the worker yields; Stop takes effect at its next event."""
        yield from self._turn(self._busy, cancel)
        try:
            plan, started = self._planned(), time.perf_counter()
            yield Step(0, 0, msg("Waiting for a GPU"))
            last: dict[int, Chunk] = {}
            events = lent(plan, call)
            try:
                for one in _sentences(events):
                    if isinstance(one, Ended):
                        one.raise_failure()
                        return
                    self._busy, event = one.busy, one.event
                    if isinstance(event, Chunk):
                        last[event.index] = event
                    if isinstance(event, Receipt):
                        self._last_receipt = event
                    yield event
                    if cancel.cancelled and not isinstance(event, Receipt):
                        break
            finally:
                events.close()
            if not last:
                raise Cancelled()
            ended = [replace(chunk, finish="cancelled") for chunk in last.values()]
            self._last_receipt = receipts.generate_receipt(plan, time.perf_counter() - started, ended, {}, [])
            yield self._last_receipt
        finally:
            self._done()


def _sentences(events: Iterator[Event | Ended]) -> Iterator[Event | Ended]:
    """The events; a refusal by ZeroGPU is raised as a `LowMemError`."""
    try:
        yield from events
    except Exception as error:
        # ZeroGPU raises gradio's error, which the engine does not import; it has a title and a message.
        title, message = getattr(error, "title", ""), getattr(error, "message", "")
        if isinstance(error, LowMemError) or "ZeroGPU" not in str(title):
            raise
        raise NotAllowed(
            f"{title}: {message}.".replace("..", "."), msg("Try again later, or load it on the CPU.")
        ) from None
