"""ZeroGPU Spaces, where a GPU is attached for one action at a time.

The app's own process has no GPU. A function decorated with `spaces.GPU` runs in a worker that has one for a requested
number of seconds; its arguments and what it yields are pickled, and nothing else comes back. So loading a model only
downloads and plans it; each answer loads it in its worker, which keeps it for the next answer if it lives that long.
The seconds are estimated from the plan, since visitors have a small daily quota. Needs the package `spaces`, which must
be imported before torch.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import spaces

from lowmem.errors import Cancelled, LowMemError, NotAllowed, Unsupported
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.chat import ChatMessage
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.plan import Plan
from lowmem.runtime import receipts
from lowmem.runtime.session import Session
from lowmem.settings import gpu_is_attached

if TYPE_CHECKING:
    from lowmem.runtime.loader import Loaded

Event = Step | Chunk | Completion | Receipt

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


def estimated_seconds(
    plan: Plan,
    prompt: str | Sequence[ChatMessage] | Sequence[str],
    options: GenerateOptions,
    raw: bool = False,  # noqa: ARG001  called with the arguments of `lent`
    batch_size: int | None = None,
) -> int:
    """GPU seconds to request for loading `plan` and answering, with a safety margin; at most `LONGEST_SECONDS`."""
    prompts = 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], dict) else len(prompt)
    turns = math.ceil(prompts / (batch_size or PROMPTS_AT_ONCE))
    load = START_SECONDS + plan.spec.size_on_disk / READ_BYTES_PER_SECOND
    read = len(str(prompt)) / CHARACTERS_PER_TOKEN / PREFILL_TOKENS_PER_SECOND
    token = plan.spec.layers * SECONDS_PER_LAYER + plan.main.share("weights") / VRAM_BYTES_PER_SECOND
    return min(LONGEST_SECONDS, math.ceil(SAFETY * (load + read + turns * options.max_new_tokens * token)))


@spaces.GPU(duration=estimated_seconds)
def lent(
    plan: Plan,
    prompt: str | Sequence[ChatMessage] | Sequence[str],
    options: GenerateOptions,
    raw: bool = False,
    batch_size: int | None = None,
) -> Iterator[Event | LowMemError]:
    """Runs in the worker: load the plan unless it is loaded, then answer a prompt, a conversation or a tuple of prompts.

    Ends before the GPU is detached. Yields a `LowMemError` instead of raising it, since raised ones lose their message.
    """
    global _worker_session
    gpu_is_attached()
    token = CancelToken()
    timer = threading.Timer(estimated_seconds(plan, prompt, options, raw, batch_size) - GRACE_SECONDS, token.set)
    timer.daemon = True
    timer.start()
    started = time.perf_counter()
    _worker_session = session = _worker_session or Session()
    try:
        if session.plan != plan:
            gpu = _limit_vram(plan)
            yield from (event for event in session.load(plan, token) if isinstance(event, Step))
        else:
            gpu = _real_memory()
        loading = time.perf_counter() - started
        work = (
            session.batch(prompt, options, token, raw=raw, batch_size=batch_size)
            if isinstance(prompt, tuple)
            else session.generate(prompt, options, token, raw=raw)  # type: ignore[arg-type]
        )
        for event in work:
            yield _with_gpu(event, gpu, loading, token.cancelled) if isinstance(event, Receipt) else event
    except LowMemError as error:
        yield error
    finally:
        timer.cancel()


def _limit_vram(plan: Plan) -> dict[str, Any]:
    """Limit torch to the VRAM budget, as on a GPU of that size; returns the real GPU."""
    gpu, limit = _real_memory(), plan.budget.vram
    if gpu and limit is not None:
        import torch

        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / gpu["gpu_total_bytes"]))
    return gpu


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


class LentSession(Session):
    """The session of a ZeroGPU Space. On the CPU it is an ordinary session."""

    def _attempt(
        self, plan: Plan, folder: Path, cancel: CancelToken, force: bool
    ) -> Generator[Step, None, dict[str, int]]:
        if plan.place.kind == "cpu":
            return (yield from super()._attempt(plan, folder, cancel, force))
        yield Step(0, 0, msg("A GPU is attached with the first answer"))
        self._taken_bytes, self._overhead_bytes = 0, plan.hardware.runtime_bytes
        self._plan = plan
        return {}

    @property
    def _lends(self) -> bool:
        return self._plan is not None and self._loaded is None

    def _resident(self) -> tuple[Loaded, Plan]:
        if self._lends:
            raise Unsupported(
                msg("This needs a model that stays in memory, but here a GPU is attached for one answer at a time."),
                msg('Load the model with CPU under "Runs on".'),
            )
        return super()._resident()

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        **settings: Any,
    ) -> Iterator[Step | Chunk | Receipt]:
        if not self._lends:
            yield from super().generate(prompt, options, cancel, **settings)
            return
        work = prompt if isinstance(prompt, str) else list(prompt)
        yield from self._lent(msg("Generating"), work, options, cancel, **settings)  # type: ignore[misc]

    def batch(
        self, prompts: Sequence[str], options: GenerateOptions, cancel: CancelToken | None = None, **settings: Any
    ) -> Iterator[Step | Completion | Receipt]:
        if not self._lends:
            yield from super().batch(prompts, options, cancel, **settings)
            return
        what = msg("Answering {prompts:,} prompts", prompts=len(prompts))
        yield from self._lent(what, tuple(prompts), options, cancel, **settings)  # type: ignore[misc]

    def _lent(
        self,
        what: str,
        prompt: Any,
        options: GenerateOptions,
        cancel: CancelToken | None,
        *,
        raw: bool = False,
        batch_size: int | None = None,
        force: bool = False,  # noqa: ARG002  the worker keeps to the plan
    ) -> Iterator[Event]:
        """Forward what the worker yields; Stop takes effect at its next event."""
        cancel = cancel or CancelToken()
        yield from self._turn(what, cancel)
        try:
            plan, started = self._planned(), time.perf_counter()
            yield Step(0, 0, msg("Waiting for a GPU"))
            last: dict[int, Chunk] = {}
            events = lent(plan, prompt, options, raw, batch_size)
            try:
                for event in _sentences(events):
                    if isinstance(event, Chunk):
                        last[event.index] = event
                    if isinstance(event, Receipt):
                        self._last_receipt = event
                    yield event
                    if cancel.cancelled and not isinstance(event, Receipt):
                        break
                else:
                    return
            finally:
                events.close()
            if not last:
                raise Cancelled()
            ended = [replace(chunk, finish="cancelled") for chunk in last.values()]
            self._last_receipt = receipts.generate_receipt(plan, time.perf_counter() - started, ended, {}, [])
            yield self._last_receipt
        finally:
            self._done()


def _sentences(events: Iterator[Event | LowMemError]) -> Iterator[Event]:
    """The events; a refusal by the worker or by ZeroGPU is raised as a `LowMemError`."""
    try:
        for event in events:
            if isinstance(event, LowMemError):
                raise event
            yield event
    except Exception as error:
        # ZeroGPU raises gradio's error, which the engine does not import; it has a title and a message.
        title, message = getattr(error, "title", ""), getattr(error, "message", "")
        if isinstance(error, LowMemError) or "ZeroGPU" not in str(title):
            raise
        raise NotAllowed(
            f"{title}: {message}.".replace("..", "."), msg("Try again later, or load it on the CPU.")
        ) from None
