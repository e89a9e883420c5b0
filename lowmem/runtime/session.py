"""The resident model: load, estimate, generate, unload, and fall back when memory runs out.

Independent of web pages and command lines. Every action is a generator of events that ends
in a `Receipt`; a lock serializes actions on the one model.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem.background import stoppable
from lowmem.errors import (
    BadInput,
    Cancelled,
    DoesNotFit,
    LowMemError,
    OutOfMemory,
    Unsupported,
    file_errors,
    memory_errors,
)
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step, WithResult
from lowmem.generate.chat import ChatMessage
from lowmem.generate.options import LARGEST_BATCH, GenerateOptions
from lowmem.generate.window_limits import check_window, context_of
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.cap import cap_gpu_memory, cap_memory, cap_note, settle
from lowmem.machine.hardware import Hardware, probe
from lowmem.machine.memory_limits import other_processes_bytes
from lowmem.machine.monitor import PeakMeter, outside_heap, release_memory, trim_heap
from lowmem.messages import msg
from lowmem.models.choices import choices, shortage
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.planning.described import refuse_described
from lowmem.planning.estimate import reestimate
from lowmem.planning.fallback import WHILE_LOADING, next_fallback, quantized_kv, without_graph
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import tokenizer_line
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan as make_plan
from lowmem.planning.seconds import answer_seconds, learn_by_size, learn_speeds, or_zero, seconds_by_size
from lowmem.runtime import receipts

if TYPE_CHECKING:
    from lowmem.runtime.loader import Loaded

T = TypeVar("T")
E = TypeVar("E")

log = logging.getLogger("lowmem.session")

FEWER = msg("Generate fewer tokens, quantize the KV cache to int8, or load fewer bits.")

PYTHON_BYTES = 15_000_000
"""RSS of a bare interpreter: counted in `runtime_bytes`, but already held by a running process."""


class Session:
    """Owns the resident model. One per process; thread-safe.

    Args:
        capped: cap the whole process at the loaded plan's budget, see `machine.cap`. For a process that does nothing else.
    """

    def __init__(self, *, capped: bool = False) -> None:
        self._capped = capped
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._plan: Plan | None = None
        self._taken_bytes = 0  # memory that loading took
        self._overhead_bytes = 0  # memory of the process without the weights
        self._load_receipt: Receipt | None = None
        self._last_receipt: Receipt | None = None
        self._busy = ""

    @property
    def plan(self) -> Plan | None:
        """The plan of the resident model, None when nothing is loaded."""
        return self._plan

    @property
    def load_receipt(self) -> Receipt | None:
        return self._load_receipt

    @property
    def last_receipt(self) -> Receipt | None:
        return self._last_receipt

    @property
    def overhead_bytes(self) -> int:
        """RAM of the process without the weights, while a model is loaded."""
        return self._overhead_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes that the resident model has streamed from disk or RAM since it was loaded."""
        streamer = self._loaded.streamer if self._loaded else None
        return streamer.bytes_read if streamer else 0

    @property
    def busy(self) -> str:
        """The current action ("Loading ..."), or ""."""
        return self._busy

    def hardware(self) -> Hardware:
        """The machine now; `runtime_bytes` is what this process will hold without a model."""
        found = probe()
        if self._loaded is not None:
            return replace(found, runtime_bytes=self._overhead_bytes)
        if "torch" in sys.modules:  # a job imports it first
            return replace(found, runtime_bytes=max(found.process_bytes, found.runtime_bytes))
        return replace(found, runtime_bytes=found.process_bytes + found.runtime_bytes - PYTHON_BYTES)

    def plan_for(self, model: str | ModelSpec | None, goal: Goal, budget: MemoryBudget = UNLIMITED) -> Plan:
        """The best plan for `goal` with the memory that is free now; it may be over budget, see its `verdict`.

        Args:
            model: a reference, see `read_spec`, or its spec; None for the best model that fits.
            budget: lowers the limits further.

        Raises:
            LowMemError: see `planner.plan` and `read_spec`.
        """
        hardware = self.hardware()
        spec = read_spec(model) if isinstance(model, str) else model
        if spec is not None:
            return make_plan(spec, hardware, budget.bounded(hardware), goal)
        return make_plan(None, hardware, budget.bounded(hardware), goal, choices(), shortage())

    def load(self, plan: Plan, cancel: CancelToken | None = None, *, force: bool = False) -> Iterator[Step | Receipt]:
        """Download the model if it is missing, free the resident one and load; on out-of-memory, follow the fallback chain.

        Args:
            force: load even if the estimate exceeds the budget, and do not enforce the budget.

        Raises:
            DoesNotFit: the plan exceeds its budget and `force` is off.
            OutOfMemory: no fallback is left.
            Unsupported: the plan is for a described machine.
        """
        refuse_described(plan)
        cancel = cancel or CancelToken()
        yield from self._turn(msg("Loading {model}", model=plan.spec.name), cancel)
        try:
            if not force:
                refuse_if_over(plan, msg("Lower the context, choose fewer bits or a smaller model, or try anyway."))
            what = msg("{model} was not loaded", model=plan.spec.name)
            with file_errors(what), memory_errors(what):
                self._load_receipt = self._last_receipt = yield from self._load(plan, cancel, force)
            yield self._load_receipt
        finally:
            self._done()

    def unload(self) -> Receipt | None:
        """Free the model's memory, after the current action ends; None if nothing was loaded."""
        with self._lock:
            plan, started = self._plan, time.perf_counter()
            if plan is None:
                return None
            taken, before = self._taken_bytes, _resident_bytes()
            self._drop()
            returned = before - _resident_bytes()
            self._last_receipt = receipts.unload_receipt(plan, time.perf_counter() - started, taken, returned)
            return self._last_receipt

    def set_budget(self, budget: MemoryBudget) -> None:
        """Hold the resident model's next actions to another budget; nothing happens when nothing is loaded."""
        plan = self._plan
        if plan is not None:
            self._plan = replace(plan, budget=budget)
            if self._capped:
                cap_memory(budget)

    def run(
        self, action: Callable[..., Iterator[E]], *arguments: Any, cancel: CancelToken | None = None, **options: Any
    ) -> Iterator[E]:
        """Run an action of another module, whose first argument is the session, wherever the model lives."""
        return action(self, *arguments, cancel=cancel, **options)

    def estimate(self, prompt_tokens: int, options: GenerateOptions, batch: int = 1, *, raw: bool = False) -> Plan:
        """The resident plan re-estimated for one action, with a context of prompt and `max_new_tokens`.

        Args:
            batch: prompts at once.
            raw: they are texts, for which no chat template is rendered.
        """
        plan = self._measured_plan()
        return reestimate(
            plan,
            context=min(prompt_tokens + options.max_new_tokens, context_of(plan.spec.context, options)),
            window=options.window,
            sinks=options.sinks if options.window else 0,
            batch=batch * options.num_return_sequences,
            chat=plan.spec.has_chat_template and not raw,
            cache_type=options.cache_type if options.use_cache else "none",
            # Sequences of one prompt share one prefill, so its activations exist once.
            prefill_chunk=max(1, options.prefill_chunk // options.num_return_sequences)
            if options.use_cache
            else min(plan.spec.context, options.window or plan.spec.context),
        )

    def generate(
        self,
        prompt: str | Sequence[ChatMessage],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        *,
        raw: bool = False,
        force: bool = False,
    ) -> Iterator[Step | Chunk | Receipt]:
        """Stream an answer to a prompt or conversation; `raw` completes the text without the chat template.

        Raises:
            BadInput: nothing loaded, an empty prompt, a prompt beyond the context.
            DoesNotFit: the estimate exceeds the budget and `force` is off.
            OutOfMemory, CorruptModel (numbers that are not numbers), Cancelled (before the first token).
        """
        from lowmem.generate.prompts import check_length, encode_prompt

        cancel = cancel or CancelToken()
        yield from self._turn(msg("Generating"), cancel)
        try:
            yield from self._ensure_backend(options, cancel, force)
            loaded, plan = self._resident()
            ids = encode_prompt(loaded.tokenizer, prompt, raw, cancel)
            check_window(options, plan.spec.context)
            room, note = check_length(len(ids), options.max_new_tokens, context_of(plan.spec.context, options))
            wanted, options = options, replace(options, max_new_tokens=room)
            action = self.estimate(len(ids), options, raw=raw)
            if not force:
                refuse_if_over(action, FEWER)
            notes = [note] if note else []
            receipt = yield from self._generate(ids, options, action, notes, cancel, force)
            receipt = replace(receipt, predicted_seconds=or_zero(answer_seconds, plan, receipt))
            learn_speeds(plan, receipt)
            self._last_receipt = receipts.with_prompt(receipt, plan, prompt, wanted, raw, force)
            yield self._last_receipt
        finally:
            self._done()

    def batch(
        self,
        prompts: Sequence[str],
        options: GenerateOptions,
        cancel: CancelToken | None = None,
        *,
        raw: bool = False,
        batch_size: int | None = None,
        force: bool = False,
    ) -> Iterator[Step | Completion | Receipt]:
        """Answer many prompts; completions come after each batch, in order of prompt length.

        Args:
            batch_size: prompts at once, fewer if the budget does not allow them; None lets the budget decide.

        Raises:
            BadInput: nothing loaded, no prompts, or one that is empty or too long.
            DoesNotFit: not even a single prompt fits the budget, and `force` is off.
        """
        from lowmem.generate.batching import lowered, run_batches

        if batch_size is not None and not 1 <= batch_size <= LARGEST_BATCH:
            raise BadInput(
                msg("A batch size of {size} is not possible.", size=batch_size),
                msg("Use 1 to {most}, or leave it out for as many as the budget allows.", most=LARGEST_BATCH),
            )
        cancel = cancel or CancelToken()
        yield from self._turn(msg("Answering {prompts:,} prompts", prompts=len(prompts)), cancel)
        try:
            yield from self._ensure_backend(options, cancel, force)
            loaded, plan = self._resident()
            check_window(options, plan.spec.context)
            largest, refused = 1, 0

            def fits(longest: int, size: int) -> bool:
                nonlocal largest, refused
                if not force:
                    refuse_if_over(self.estimate(longest, options, 1, raw=raw), FEWER)
                accepted = force or self.estimate(longest, options, size, raw=raw).verdict != "over"
                largest, refused = (max(largest, size), refused) if accepted else (largest, max(refused, size))
                return accepted

            started = time.perf_counter()
            done: list[Completion] = []
            with self._meter(plan, force) as meter:
                events = run_batches(
                    loaded.model,
                    loaded.tokenizer,
                    prompts,
                    options,
                    context=context_of(plan.spec.context, options),
                    cancel=cancel,
                    check=meter.check,
                    batch_size=batch_size,
                    fits=fits,
                    raw=raw,
                )
                for event in events:
                    if isinstance(event, Completion):
                        done.append(event)
                    yield event
            longest = max(completion.prompt_tokens for completion in done)
            action = self.estimate(longest, options, min(largest, len(prompts)), raw=raw)
            receipt = receipts.batch_receipt(action, time.perf_counter() - started, done, meter.peak)
            if batch_size and refused:
                receipt = replace(receipt, notes=(*receipt.notes, lowered(refused, largest)))
            receipt = receipts.with_prompts(
                receipt, plan, prompts, options, raw=raw, batch_size=batch_size, force=force
            )
            self._last_receipt = receipt
            yield receipt
        finally:
            self._done()

    def work(
        self,
        what: str,
        task: Callable[[Loaded, Plan, Callable[[], None]], Generator[E, None, T]],
        cancel: CancelToken,
        *,
        force: bool = False,
        layers: bool = True,
    ) -> Generator[Step | E, None, tuple[T, dict[str, int]]]:
        """Run `task` on the resident model; returns its result and the peak bytes by memory.

        Args:
            task: is called with the model, its plan and a budget check to call in every long loop.
            layers: the task needs the layers of the model, so a graph is loaded for torch instead.

        Raises:
            BadInput: nothing is loaded.
            Unsupported: the model is an exported graph, whose layers are not accessible.
        """
        yield from self._turn(what, cancel)
        try:
            if layers:
                yield from self._ensure_backend(None, cancel, force)
            loaded, plan = self._resident()
            with memory_errors(msg("{what} was not finished", what=what)), self._meter(plan, force) as meter:
                result = yield from task(loaded, plan, meter.check)
            return result, meter.peak
        finally:
            release_memory()
            self._done()

    def _turn(self, what: str, cancel: CancelToken) -> Iterator[Step]:
        """Wait until the model is free; steps say what it is busy with."""
        while not self._lock.acquire(timeout=0.2):
            cancel.check()
            yield Step(0, 0, msg("Waiting for: {busy}", busy=self._busy or msg("other work")))
        self._busy = what
        if self._loaded is not None and self._loaded.streamer is not None:
            self._loaded.streamer.check = cancel.check

    def _done(self) -> None:
        self._busy = ""
        self._lock.release()

    def _planned(self) -> Plan:
        if self._plan is None:
            raise BadInput(msg("No model is loaded."), msg("Load one first; the recommended setup takes one click."))
        return self._plan

    def _resident(self) -> tuple[Loaded, Plan]:
        plan = self._measured_plan()
        assert self._loaded is not None  # set together
        return self._loaded, plan

    def _measured_plan(self) -> Plan:
        """The resident plan with what this process holds besides the weights, which is known once it has loaded them."""
        plan = self._planned()
        return replace(plan, hardware=replace(plan.hardware, runtime_bytes=self._overhead_bytes))

    def _ensure_backend(
        self, options: GenerateOptions | None, cancel: CancelToken, force: bool
    ) -> Generator[Step, None, None]:
        """Reload a graph for torch if only torch can run `options`; None asks for access to the layers."""
        plan = self._resident()[1]
        if plan.backend != "onnx" or (options is not None and self.estimate(1, options).backend == "onnx"):
            return
        reason = (
            msg("An exported graph does not expose its layers.")
            if options is None
            else msg("An exported graph has no window and no quantized KV cache.")
        )
        on_torch = without_graph(plan, reason)
        if on_torch is None:
            raise Unsupported(
                msg("{model} is loaded as a graph. {reason}", model=plan.spec.name, reason=reason),
                msg("Load the original model for torch."),
            )
        yield Step(0, 0, msg("{reason} Loading for torch.", reason=reason))
        if not force:
            refuse_if_over(on_torch, msg("Choose a smaller model or fewer bits."))
        self._load_receipt = yield from self._load(on_torch, cancel, force)

    def _meter(self, plan: Plan, force: bool) -> PeakMeter:
        trim_heap()  # else what an earlier, longer action has freed is charged to this one
        settle()
        return PeakMeter(UNLIMITED if force else plan.budget)

    def _drop(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = self._plan = self._load_receipt = None
        release_memory()

    def _load(self, plan: Plan, cancel: CancelToken, force: bool) -> Generator[Step, None, Receipt]:
        """Load `plan` or the first fallback that works; the return value is the receipt."""
        from lowmem.errors import is_out_of_memory
        from lowmem.models.fetch import fetch
        from lowmem.models.source import resolve_folder

        notes: list[str] = []
        while True:
            folder = yield from fetch(plan.spec, cancel)
            plan = replace(plan, spec=replace(plan.spec, source=resolve_folder(folder, plan.spec.ref)))
            self._drop()
            started = time.perf_counter()
            try:
                peak = yield from self._attempt(plan, folder, cancel, force)
                if self._capped and not force and (note := cap_note()):
                    notes.append(note)
                seconds = time.perf_counter() - started
                expected = or_zero(seconds_by_size, plan, "loading")
                learn_by_size(plan, "loading", seconds)
                receipt = receipts.load_receipt(plan, seconds, peak, notes, folder)
                return replace(receipt, predicted_seconds=expected)
            except Exception as error:
                # The planner chose the graph, so its failure is no reason to refuse the model.
                why = str(error) if isinstance(error, LowMemError) else msg("The graph could not be written.")
                lower = (
                    None
                    if isinstance(error, Cancelled)
                    else without_graph(plan, msg("{why} Torch runs it instead.", why=why))
                )
                refused = lower is not None
                if refused:
                    log.warning("no graph for %s", plan.spec.name, exc_info=error)
                elif is_out_of_memory(error):
                    lower = next_fallback(plan, WHILE_LOADING)
                else:
                    raise
                if lower is None:
                    raise OutOfMemory(
                        msg(
                            "Loading {model} in {precision} ran out of memory, and nothing smaller is left.",
                            model=plan.spec.name,
                            precision=plan.precision,
                        ),
                        msg("Close other programs or choose a smaller model."),
                    ) from error
            log.warning("loading %s in %s did not work; %s", plan.spec.name, plan.precision, lower.reason)
            notes.append(lower.reason if refused else msg("Memory ran out. {reason}", reason=lower.reason))
            yield Step(0, 0, notes[-1])
            plan = lower

    def _attempt(
        self, plan: Plan, folder: Path, cancel: CancelToken, force: bool
    ) -> Generator[Step, None, dict[str, int]]:
        yield Step(0, 0, msg("Starting torch"))
        stoppable(_start_torch, cancel)
        from lowmem.runtime import loader

        if self._capped:  # not before: what the libraries map for later, 32 MB a core, is a reserve
            cap_memory(UNLIMITED if force else plan.budget)
        if plan.place.kind == "cuda":
            cap_gpu_memory(UNLIMITED if force else plan.budget)
        if plan.backend == "onnx":
            from lowmem.runtime.onnx import loader as onnx_loader

            folder = yield from onnx_loader.graph_folder(plan, folder, cancel, UNLIMITED if force else plan.budget)
        with self._meter(plan, force) as meter, outside_heap():
            on_onnx = plan.backend == "onnx"
            loading = onnx_loader.load_graph(folder) if on_onnx else loader.load(plan, folder, cancel)
            yield next(loading)
            release_memory()
            before = _resident_bytes()
            loaded = yield from _guarded(loading, meter.check)
            if plan.placement is None or plan.placement.mapped:  # else it would read the disk once for nothing
                loader.warm_up(loaded)
        release_memory()
        self._taken_bytes = _resident_bytes() - before
        self._overhead_bytes = before + self._taken_bytes - (plan.main.share("weights") if plan.device == "cpu" else 0)
        self._overhead_bytes -= tokenizer_line(plan.spec).count
        self._overhead_bytes += other_processes_bytes()  # the page's process shares the budget
        self._loaded, self._plan = loaded, plan
        return meter.peak

    def _generate(
        self, ids: list[int], options: GenerateOptions, action: Plan, notes: list[str], cancel: CancelToken, force: bool
    ) -> Generator[Step | Chunk, None, Receipt]:
        """Stream; if memory runs out before any text, try once more with a quantized cache and a smaller prefill chunk."""
        from lowmem.errors import is_out_of_memory
        from lowmem.generate.text import stream

        loaded, plan = self._resident()
        started, last = time.perf_counter(), dict[int, Chunk]()
        with self._meter(plan, force) as meter:
            while True:
                events = stream(
                    loaded.model,
                    loaded.tokenizer,
                    ids,
                    options,
                    context=context_of(plan.spec.context, options),
                    cancel=cancel,
                    check=meter.check,
                )
                try:
                    for event in events:
                        if isinstance(event, Chunk):
                            last[event.index] = event
                        yield event
                    break
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    lower = quantized_kv(action) if options.use_cache else None
                    if not last and lower is None:
                        raise OutOfMemory(
                            msg("Memory ran out while reading {ids:,} prompt tokens.", ids=len(ids)),
                            msg("Shorten the prompt, or load fewer bits."),
                        ) from error
                # Only after the exception handler can the failed attempt's cache be collected.
                release_memory()
                if last or lower is None:
                    written = sum(chunk.new_tokens for chunk in last.values())
                    notes.append(
                        msg("Memory ran out after {written:,} tokens; the text so far is kept.", written=written)
                    )
                    break
                meter.exceeded = ""
                action = lower
                options = replace(options, cache_type="int8", prefill_chunk=max(16, options.prefill_chunk // 4))
                notes.append(msg("Memory ran out. {reason}", reason=lower.reason))
                yield Step(0, 0, notes[-1])
        return receipts.generate_receipt(action, time.perf_counter() - started, list(last.values()), meter.peak, notes)


def _start_torch() -> None:
    """Import torch, which takes seconds and which a process may never need."""
    from lowmem.generate import batching, text  # noqa: F401  what the first answer would import
    from lowmem.runtime import loader  # noqa: F401


def refuse_if_over(plan: Plan, hint: str) -> None:
    if plan.verdict == "over":
        raise DoesNotFit(plan.sentence(), hint)


def _guarded(events: Generator[Step, None, T], check: Callable[[], None]) -> Generator[Step, None, T]:
    """Forward events and the return value, with a check between events."""
    check()
    running = WithResult(events)
    for event in running:
        yield event
        check()
    return running.result


def _resident_bytes() -> int:
    """Memory of this process: RSS, and what torch has reserved on a GPU."""
    import psutil

    held = psutil.Process().memory_info().rss
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        held += torch.cuda.memory_reserved()
    return held
