"""One prompt through an offloaded model: plan, load, generate, and what it cost next to what was predicted.

The command line, the tab and the benchmark run this; `job` is the same in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.models.fetch import fetch
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.offload.planned import by_budget, most_answers, placed
from lowmem.offload.predict import predict, weights
from lowmem.offload.receipt import completed, repeating
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.offloading import offload_precision
from lowmem.planning.placement import all_resident, chosen
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan as make_plan
from lowmem.runtime.session import Session

MOST_SEQUENCES = 16
"""Answers to one prompt that `GenerateOptions.num_return_sequences` allows."""

METHODS = ("auto", "resident", "ram", "disk", "streamed", "both", "accelerate")
"""By budget; without offloading; blocks in RAM; on disk (in place where the budget holds them, or always past the page cache);
the first half in RAM and the others on disk; on disk through accelerate's hooks."""


@dataclass(frozen=True, slots=True)
class Where:
    """What somebody said about blocks: numbers for a place; None leaves all to the budget.

    Args:
        ram, disk: blocks to be sent there. On a CPU, RAM is home.
        may_map: blocks on disk may be used in place, if the RAM budget holds them.
        resident: no offloading at all.
    """

    ram: tuple[int, ...] | None = None
    disk: tuple[int, ...] | None = None
    may_map: bool = True
    resident: bool = False

    @property
    def chosen(self) -> bool:
        return self.ram is not None or self.disk is not None


def plan_for(
    session: Session,
    model: str | ModelSpec,
    goal: Goal,
    budget: MemoryBudget = UNLIMITED,
    where: Where | None = None,
    most: bool = False,
) -> Plan:
    """The plan of an offloaded run, by budget unless `where` chooses.

    Args:
        most: for as many sequences at once as pay, whatever `goal.batch` says.

    Raises:
        DoesNotFit: the budget is below what one block at a time takes; says which would do.
        BadInput: blocks that there are not.
    """
    hardware = session.hardware()
    # The precision of a resident model is another question: what streams is what is stored.
    spec = read_spec(model) if isinstance(model, str) else model
    base = make_plan(spec, hardware, budget.bounded(hardware), replace(goal, backend="torch"))
    if goal.precision == "auto":
        # What a small budget made the planner choose is no wish.
        precision = offload_precision(replace(base, precision=goal.precision))
        base = reestimate(base, precision=precision, reason="Everything at home, as without offloading.")
    if where is not None and where.resident:
        return base
    place: Callable[[Plan], Plan] = by_budget
    if where is not None and where.chosen:
        placement = all_resident(base.spec, base.place.kind)
        for name, indices in (("ram", where.ram), ("disk", where.disk)):
            placement = chosen(placement, name, indices or ())
        place = partial(placed, placement=placement, may_map=where.may_map)
    return most_answers(base, place) if most else place(base)


def measure(
    model: str, disk: list[int], in_ram: list[int], mapped: bool, batch: int = 1, again: bool = False
) -> Generator[Step, None, None]:
    """A job of its own that measures what predicting this placement takes: its caller need not load torch for it."""
    yield Step(0, 0, "Measuring how fast this machine reads")
    places = Where(tuple(in_ram), tuple(disk), may_map=mapped)
    plan = plan_for(Session(), model, Goal(batch=batch), where=places)
    folder = yield from fetch(plan.spec.source, CancelToken())
    predict(plan, weights(folder) or folder, again)


def where(method: str, layers: int) -> Where:
    """The blocks that a method of the comparison sends away."""
    everything = tuple(range(layers))
    if method == "ram":
        return Where(ram=everything)
    if method in ("disk", "streamed", "accelerate"):
        return Where(disk=everything, may_map=method == "disk")
    if method == "both":
        return Where(ram=everything[: layers // 2], disk=everything[layers // 2 :])
    return Where(resident=method == "resident")


def run(
    session: Session,
    plan: Plan,
    prompts: Sequence[str],
    options: GenerateOptions,
    cancel: CancelToken | None = None,
    *,
    raw: bool = False,
    again: bool = False,
    force: bool = False,
) -> Iterator[Step | Chunk | Completion | Receipt]:
    """Load `plan` unless it is loaded, and answer: one prompt as a stream, several at once as completions.

    The receipt's details say where the blocks were, bytes read, and seconds per token, predicted and measured.
    """
    cancel = cancel or CancelToken()
    folder = yield from fetch(plan.spec.source, cancel)
    yield Step(0, 0, "Measuring how fast this machine reads")
    speed = predict(plan, weights(folder) or folder, again)
    loading: dict[str, int] = {}
    if session.plan is None or replace(session.plan, estimates=(), hardware=plan.hardware) != replace(
        plan, estimates=()
    ):
        for event in session.load(plan, cancel, force=force):
            if isinstance(event, Receipt):
                loading = event.measured
            else:
                yield event
    yield Step(0, 0, "Reading the first blocks")
    before = session.streamed_bytes
    if len(prompts) == 1:
        events: Iterator[Any] = session.generate(prompts[0], options, cancel, raw=raw, force=force)
    else:
        events = session.batch(prompts, options, cancel, raw=raw, batch_size=len(prompts), force=force)
    for event in events:
        if isinstance(event, Receipt):
            read = session.streamed_bytes - before
            yield completed(event, plan, speed, read, loading, repeating(plan, prompts, options, raw))
        else:
            yield event


def together(prompt: str, options: GenerateOptions, batch: int) -> tuple[list[str], GenerateOptions]:
    """What `run` takes for `batch` answers to one prompt: as one answer in parts, the prompt is processed once."""
    if batch <= MOST_SEQUENCES:
        return [prompt], replace(options, num_return_sequences=batch)
    return [prompt] * batch, options


def job(
    model: str,
    method: str,
    prompt: str,
    new_tokens: int,
    budget: Mapping[str, int],
    context: int = 512,
    batch: int = 1,
    disk: list[int] | None = None,
    in_ram: list[int] | None = None,
) -> Generator[Step, None, dict[str, Any]]:
    """One method of the comparison, in a process of its own; returns the receipt as a dictionary.

    Args:
        method: one of `METHODS`.
        disk, in_ram: blocks for "auto" that are chosen instead of left to the budget.
    """
    if method not in METHODS:
        raise BadInput(f"There is no method {method!r}.", f"Choose one of {', '.join(METHODS)}.")
    session = Session()
    yield Step(0, 0, "Starting torch")
    layers = read_spec(model).layers
    places = where(method, layers)
    if method == "auto" and (disk is not None or in_ram is not None):
        places = Where(None if in_ram is None else tuple(in_ram), None if disk is None else tuple(disk))
    plan = plan_for(session, model, Goal(context=context, batch=batch), MemoryBudget(**budget), places)
    options = GenerateOptions(max_new_tokens=new_tokens, greedy=True)
    if method == "accelerate":
        from lowmem.offload import reference

        return (yield from reference.run(plan, prompt, options)).as_dict()
    receipt: Receipt | None = None
    for event in run(session, plan, *together(prompt, options, batch), raw=True):
        if isinstance(event, Receipt):
            receipt = event
        elif isinstance(event, Chunk):
            yield Step(event.new_tokens, new_tokens, "Decoding", "tokens")
        elif isinstance(event, Step):
            yield event
    assert receipt is not None  # every action ends in one
    return receipt.as_dict()
