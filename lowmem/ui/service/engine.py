"""The engine as the page uses it: a thin layer that imports no torch until a model is loaded."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step, drain
from lowmem.fields import option
from lowmem.generate.chat import ChatMessage
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.precisions import PRECISIONS
from lowmem.settings import settings
from lowmem.ui.service.access import Access, Visitor
from lowmem.ui.service.lane import Lane

if TYPE_CHECKING:
    from pathlib import Path

    from lowmem.machine.monitor import Snapshot
    from lowmem.models.inventory import StoredFolder
    from lowmem.runtime.remote import Lost
    from lowmem.runtime.session import Session

E = TypeVar("E")

AUTO = "auto"
HARDWARE_SECONDS = 3.0  # a slider fires many events; the machine does not change between them

MOST_RECEIPTS = 1000


@dataclass(frozen=True, slots=True)
class Choice:
    """A visitor's choice of set-up. "auto" leaves it to the planner, an empty budget to the machine."""

    model: str = option(AUTO, msg("Model"), msg("A hub id, a folder, a .gguf file, or auto."))
    precision: str = option(AUTO, msg("Precision"), msg("Fewer bits, less memory."), choices=(AUTO, *PRECISIONS))
    context: int = option(
        2048, msg("Context"), msg("Tokens of prompt and answer together."), low=64, high=1 << 20, step=64
    )
    device: str = option(AUTO, msg("Device"), msg("The device that runs the model."))
    cache_type: str = option("same", msg("KV cache type"), msg("Fewer bits take less memory."), choices=CACHE_TYPES)
    budget: MemoryBudget = UNLIMITED


class Engine:
    """One machine, one resident model, as the page sees them.

    Args:
        session: makes the session on first use.
        access: who may do what; on a public page only models below lowmem's own folders may be named by path.
        ceiling: the budget that the owner set for this page; every other budget is lowered to it.

    Attributes:
        lane, planning: the queues in front of what runs a model, and of long work that only plans.
    """

    def __init__(
        self,
        session: Callable[[], Session] | None = None,
        *,
        access: Access | None = None,
        ceiling: MemoryBudget = UNLIMITED,
    ) -> None:
        self.access, self.ceiling = access or Access(), ceiling
        self.lane, self.planning = Lane(), Lane()
        self._make_session = session or _real_session
        self._session: Session | None = None
        self._lock, self._measuring = threading.Lock(), threading.Lock()
        self._hardware: tuple[float, Hardware] | None = None
        self._specs: dict[tuple[str, bool], ModelSpec] = {}
        self._receipts: OrderedDict[Visitor, Receipt] = OrderedDict()

    @property
    def public(self) -> bool:
        return self.access.public

    # --- the machine

    def hardware(self) -> Hardware:
        """The machine, at most a few seconds old."""
        now = time.monotonic()
        if self._hardware is None or now - self._hardware[0] > HARDWARE_SECONDS:
            self._hardware = (now, self.session.hardware())
        return self._hardware[1]

    def measure(self, measuring: Generator[Step, None, object]) -> None:
        """Run what measures this machine for an estimate: only for the page's owner, one at a time, and not while the model
        computes, since each would slow the other down.
        """
        with self._measuring:
            if self.access.owned and not self.busy:
                drain(measuring)

    def snapshot(self) -> Snapshot:
        from lowmem.machine.monitor import snapshot

        return snapshot()

    def stored(self) -> list[StoredFolder]:
        """Models, results and graphs on this machine's disk, the largest first."""
        from lowmem.models.inventory import stored_folders

        return stored_folders()

    def delete(self, key: str) -> int:
        """Delete what `stored` lists under `key`; returns the bytes that come free.

        Raises:
            NotAllowed: the request is a visitor's.
            BadInput: nothing is stored under `key`, or it is in use.
        """
        from lowmem.models.inventory import delete, find

        self.access.require_owner(msg("Deleting from this machine"))
        doomed = find(key)
        if self.busy:
            raise BadInput(
                msg("Nothing can be deleted while the model is working: {busy}.", busy=self.busy),
                msg("Wait, or press Stop."),
            )
        if self._is_resident(doomed.folder):
            raise BadInput(msg("{doomed} is loaded.", doomed=doomed.name), msg("Unload the model first."))
        delete(doomed)
        self._specs.clear()
        return doomed.nbytes

    def _is_resident(self, folder: Path) -> bool:
        from lowmem.models.inventory import graph_prefix

        plan = self.resident
        if plan is None:
            return False
        graph = plan.backend == "onnx" and folder.name.startswith(graph_prefix(plan.spec.source))
        return graph or plan.spec.source.folder == folder

    # --- planning

    def catalog(self) -> list[tuple[str, str]]:
        """(label, reference) of the models that lowmem knows and of those on this machine, for a dropdown."""
        from lowmem.models.catalog import CATALOG
        from lowmem.models.source import local_models

        known = [(entry.label, entry.ref) for entry in CATALOG]
        refs = {ref for _, ref in known}
        here = local_models(self.access.results)
        return known + [(model.name, model.ref) for model in here if model.ref not in refs]

    def spec(self, ref: str, *, encoders: bool = False) -> ModelSpec:
        """The model behind a reference; each is read once.

        Args:
            encoders: the model may be an encoder, which can be exported but generates nothing.

        Raises:
            NotAllowed: this visitor may not use it. And what `read_spec` raises.
        """
        from lowmem.models.source import is_current

        self.access.check_model(ref)
        known = self._specs.get((ref, encoders))
        if known is None or not is_current(known.source):
            known = self._specs[ref, encoders] = self._read_spec(ref, encoders)
        return known

    def _read_spec(self, ref: str, encoders: bool) -> ModelSpec:
        from lowmem.models.source import read_spec

        return read_spec(ref, allow_paths=not self.public, encoders=encoders)

    def precisions(self, device: str = AUTO) -> dict[str, str | None]:
        """Every precision with None, or with the reason why it does not run here."""
        from lowmem.planning.precision import available

        return {key: available(key, self.hardware(), device) for key in PRECISIONS}

    def plan(self, choice: Choice) -> Plan:
        """The plan for a choice; it may be over budget, see its `verdict`."""
        hardware = self.hardware()
        keys = [AUTO, hardware.cpu.key, *(gpu.key for gpu in hardware.gpus)]
        if choice.device not in keys:
            raise BadInput(
                msg("There is no device {device!r} here.", device=choice.device[:40]),
                msg("Choose one of {keys}.", keys=", ".join(keys)),
            )
        spec = None if choice.model in ("", AUTO) else self.spec(choice.model)
        context = min(choice.context, spec.context) if spec and spec.context else choice.context
        goal = Goal(context=context, precision=choice.precision, device=choice.device, cache_type=choice.cache_type)
        return self._plan(spec, self.bounded(choice.budget), goal)

    def _plan(self, spec: ModelSpec | None, budget: MemoryBudget, goal: Goal) -> Plan:
        from lowmem.models.choices import choices, shortage
        from lowmem.planning.planner import plan

        if spec is not None:
            return plan(spec, self.hardware(), budget, goal)
        return plan(None, self.hardware(), budget, goal, choices(), shortage())

    def download_bytes(self, spec: ModelSpec) -> int:
        """Bytes that loading would fetch, 0 when the model is here. Makes no request: controls move fast."""
        from lowmem.models.source import is_local

        return 0 if is_local(spec.ref) else spec.size_on_disk

    # --- the session

    @property
    def session(self) -> Session:
        with self._lock:
            if self._session is None:
                self._session = self._make_session()
            return self._session

    @property
    def resident(self) -> Plan | None:
        return self._session.plan if self._session else None

    @property
    def lost(self) -> Lost | None:
        """The model whose process died since the last load."""
        return getattr(self._session, "lost", None)

    @property
    def resident_ref(self) -> str:
        """The resident model's reference as the current visitor may see it: of another visitor's result, its name."""
        plan = self.resident
        if plan is None:
            return ""
        return plan.spec.name if self.access.is_private(plan.spec.source.folder) else plan.spec.ref

    def bounded(self, budget: MemoryBudget) -> MemoryBudget:
        """A visitor's budget, within the owner's and the machine's."""
        return budget.within(self.ceiling).bounded(self.hardware())

    def set_budget(self, budget: MemoryBudget) -> None:
        """Hold the resident model to another budget, if the owner asks; a visitor's takes effect with the next load."""
        if self.resident is not None and self.access.owned:
            self.session.set_budget(self.bounded(budget))

    @property
    def busy(self) -> str:
        return self._session.busy if self._session else ""

    @property
    def load_receipt(self) -> Receipt | None:
        return self._session.load_receipt if self._session else None

    @property
    def last_receipt(self) -> Receipt | None:
        """Of the last action of whoever sends the current request; it may contain a prompt, so nobody else sees it."""
        return self._receipts.get(self.access.visitor)

    def noted(self, events: Iterator[E]) -> Iterator[E]:
        """Pass the events of an action on, and remember its receipt for who started it."""
        visitor = self.access.visitor
        for event in events:
            if isinstance(event, Receipt):
                self._note(visitor, event)
            yield event

    def _note(self, visitor: Visitor, receipt: Receipt) -> None:
        self._receipts[visitor] = receipt
        self._receipts.move_to_end(visitor)
        if len(self._receipts) > MOST_RECEIPTS:
            self._receipts.popitem(last=False)

    def in_turn(self, events: Iterator[E], cancel: CancelToken, lane: str = "lane") -> Iterator[E | Step]:
        """Pass events on when it is the current visitor's turn in a lane, see `Lane.in_turn`."""
        return getattr(self, lane).in_turn(self.access.visitor, events, cancel)

    def load(self, plan: Plan, cancel: CancelToken, *, force: bool = False) -> Iterator[Step | Receipt]:
        if force:
            self.access.require_owner(msg("Going over the budget"))
        yield Step(0, 0, msg("Starting the engine"))
        yield from self.noted(self.session.load(plan, cancel, force=force))

    def unload(self) -> Receipt | None:
        """Unload when it is the current visitor's turn."""

        def events() -> Iterator[Receipt]:
            if self._session and (receipt := self._session.unload()):
                yield receipt

        found = list(self.in_turn(self.noted(events()), CancelToken()))
        return next((event for event in found if isinstance(event, Receipt)), None)

    def estimate(self, prompt_tokens: int, options: GenerateOptions) -> Plan | None:
        """The resident plan for one more answer, None when nothing is resident."""
        return self.session.estimate(prompt_tokens, options) if self.resident else None

    def estimate_whole(self, tokens: int) -> Plan | None:
        """The resident plan with a cache of all of `tokens`, whatever the model's context."""
        from lowmem.planning.estimate import reestimate

        plan = self.resident
        return reestimate(plan, context=tokens, batch=1, cache_type="same") if plan else None

    def child_budget(self, budget: MemoryBudget) -> MemoryBudget:
        """The budget of a child process beside this one and its resident model."""
        return self.bounded(budget).for_child_process()

    def isolated(self, job: str, arguments: dict[str, Any], cancel: CancelToken) -> Iterator[Any]:
        """Run a registered job in a child process; its value is the last event."""
        from lowmem.machine.isolated import Finished, run_isolated

        for event in run_isolated(job, arguments, cancel, self.child_budget(UNLIMITED)):
            yield event.value if isinstance(event, Finished) else event

    def generate(
        self, prompt: str | Sequence[ChatMessage], options: GenerateOptions, cancel: CancelToken, *, raw: bool = False
    ) -> Iterator[Step | Chunk | Receipt]:
        self.require_model()
        self.access.check_work(options)
        return self.noted(self.session.generate(prompt, options, cancel, raw=raw))

    def chat(
        self, messages: Sequence[ChatMessage], options: GenerateOptions, cancel: CancelToken
    ) -> Iterator[Step | Chunk | Receipt]:
        """One answer to a conversation: several at once belong to a completion."""
        return self.generate(messages, replace(options, num_return_sequences=1), cancel)

    def batch(
        self, prompts: Sequence[str], options: GenerateOptions, cancel: CancelToken, *, raw: bool, batch_size: int = 0
    ) -> Iterator[Step | Completion | Receipt]:
        """Answer many prompts; batch size 0 is the largest that the budget allows."""
        self.require_model()
        self.access.check_work(options, len(prompts))
        return self.noted(self.session.batch(prompts, options, cancel, raw=raw, batch_size=batch_size or None))

    def require_model(self) -> None:
        if self.resident is None:
            raise BadInput(msg("No model is loaded."), msg("Load one first."))


def precision_label(key: str) -> str:
    return msg("Automatic") if key == AUTO else PRECISIONS[key].label


def _real_session() -> Session:
    if settings().host == "zerogpu":
        from lowmem.runtime.zerogpu import LentSession

        return LentSession()
    from lowmem.runtime.remote import WorkerSession

    return WorkerSession()
