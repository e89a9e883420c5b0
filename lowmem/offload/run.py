"""Generation with an offloaded model: plan, load, generate, and compare the measured speed with the estimate.

The command line, the Offload tab and the benchmark call `run`; `job` does the same in a child process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.rates import Unmeasured, learn
from lowmem.messages import msg
from lowmem.models.fetch import fetch
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.offload.estimate import action, estimate_speed, largest_file
from lowmem.offload.plans import largest_batch, place_blocks, place_by_budget
from lowmem.offload.receipt import offload_receipt, repeat_snippet
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.offloading import offload_precision
from lowmem.planning.placement import all_resident, chosen
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session

MAX_SEQUENCES = 16
"""The upper limit of `GenerateOptions.num_return_sequences`."""

METHODS = ("auto", "resident", "ram", "disk", "streamed", "both", "accelerate")
"""auto: by budget. resident: no offloading. ram: all blocks in RAM. disk: on disk, memory-mapped if the budget holds them.
streamed: on disk, bypassing the page cache. both: half in RAM, half on disk. accelerate: on disk with accelerate's hooks."""


@dataclass(frozen=True, slots=True)
class BlockPlacement:
    """Which blocks to offload; with neither `ram` nor `disk`, the budget decides.

    Args:
        ram, disk: indices of the blocks to offload there. On a CPU, blocks in RAM are resident.
        may_map: blocks on disk may be memory-mapped if the RAM budget holds them.
        resident: no offloading at all.
    """

    ram: tuple[int, ...] | None = None
    disk: tuple[int, ...] | None = None
    may_map: bool = True
    resident: bool = False

    @property
    def explicit(self) -> bool:
        return self.ram is not None or self.disk is not None


def plan_for(
    session: Session,
    model: str | ModelSpec,
    goal: Goal,
    budget: MemoryBudget = UNLIMITED,
    placement: BlockPlacement | None = None,
    maximize_batch: bool = False,
) -> Plan:
    """The plan of an offloaded run.

    Args:
        placement: which blocks to offload; by default as many stay resident as the budget holds.
        maximize_batch: ignore `goal.batch` and plan for the batch size with the highest throughput, see `largest_batch`.

    Raises:
        DoesNotFit: the budget does not even hold one block at a time; the hint says which budget does.
        BadInput: a block that the model does not have.
    """
    base = session.plan_for(model, replace(goal, backend="torch"), budget)
    if goal.precision == "auto":
        # The planner chose a precision for a resident model, whereas offloaded blocks keep the stored one.
        precision = offload_precision(replace(base, precision=goal.precision))
        base = reestimate(base, precision=precision, reason=msg("All blocks are resident, without offloading."))
    if placement is not None and placement.resident:
        return base
    place: Callable[[Plan], Plan] = place_by_budget
    if placement is not None and placement.explicit:
        blocks = all_resident(base.spec, base.place.kind)
        for name, indices in (("ram", placement.ram), ("disk", placement.disk)):
            blocks = chosen(blocks, name, indices or ())
        place = partial(place_blocks, placement=blocks, may_map=placement.may_map)
    return largest_batch(base, place) if maximize_batch else place(base)


def measure_speeds(
    model: str, disk: list[int], in_ram: list[int], mapped: bool, batch: int = 1, again: bool = False
) -> Generator[Step, None, None]:
    """The job that measures the speeds that `estimate_speed` needs for a placement, so that its caller need not load torch."""
    yield Step(0, 0, msg("Measuring this machine's read speed"))
    placement = BlockPlacement(tuple(in_ram), tuple(disk), may_map=mapped)
    plan = plan_for(Session(), model, Goal(batch=batch), placement=placement)
    folder = yield from fetch(plan.spec, CancelToken())
    with suppress(Unmeasured):  # a disk that is too slow
        estimate_speed(plan, largest_file(folder) or folder, again)


def placement_of(method: str, layers: int) -> BlockPlacement:
    """The placement of one of `METHODS` other than "auto"."""
    everything = tuple(range(layers))
    if method == "ram":
        return BlockPlacement(ram=everything)
    if method in ("disk", "streamed", "accelerate"):
        return BlockPlacement(disk=everything, may_map=method == "disk")
    if method == "both":
        return BlockPlacement(ram=everything[: layers // 2], disk=everything[layers // 2 :])
    return BlockPlacement(resident=method == "resident")


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
    """Load `plan` unless it is loaded, and generate: yields chunks for one prompt, completions for several.

    The receipt's details have the placement, the bytes read, and predicted and measured seconds per token.

    Args:
        again: measure the machine's speeds again instead of using stored ones.
    """
    cancel = cancel or CancelToken()
    folder = yield from fetch(plan.spec, cancel)
    yield Step(0, 0, msg("Measuring this machine's read speed"))
    try:
        speed = estimate_speed(plan, largest_file(folder) or folder, again)
    except Unmeasured:
        speed = None
    loading: dict[str, int] = {}
    if session.plan is None or replace(session.plan, estimates=(), hardware=plan.hardware) != replace(
        plan, estimates=()
    ):
        for event in session.load(plan, cancel, force=force):
            if isinstance(event, Receipt):
                loading = event.measured
            else:
                yield event
    yield Step(0, 0, msg("Reading the first blocks"))
    before = session.streamed_bytes
    if len(prompts) == 1:
        events: Iterator[Any] = session.generate(prompts[0], options, cancel, raw=raw, force=force)
    else:
        events = session.batch(prompts, options, cancel, raw=raw, batch_size=len(prompts), force=force)
    for event in events:
        if isinstance(event, Receipt):
            read = session.streamed_bytes - before
            done = offload_receipt(
                event, plan, speed, read, loading, repeat_snippet(plan, prompts, options, raw, force)
            )
            if speed and (taken := done.details.get("seconds_per_token")):
                learn(action(plan), speed.seconds_per_token * event.seconds / taken, event.seconds)
            yield done
        else:
            yield event


def batched(prompt: str, options: GenerateOptions, batch: int) -> tuple[list[str], GenerateOptions]:
    """Arguments of `run` for `batch` continuations of one prompt, which is processed only once where possible."""
    if batch <= MAX_SEQUENCES:
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
    """The job that runs one method of the comparison; returns the receipt as a dict.

    Args:
        method: one of `METHODS`.
        budget: fields of `MemoryBudget`.
        disk, in_ram: blocks to offload with "auto", instead of by budget.
    """
    if method not in METHODS:
        raise BadInput(
            msg("There is no method {method!r}.", method=method),
            msg("Choose one of {methods}.", methods=", ".join(METHODS)),
        )
    session = Session()
    yield Step(0, 0, msg("Starting torch"))
    layers = read_spec(model).layers
    placement = placement_of(method, layers)
    if method == "auto" and (disk is not None or in_ram is not None):
        placement = BlockPlacement(None if in_ram is None else tuple(in_ram), None if disk is None else tuple(disk))
    plan = plan_for(session, model, Goal(context=context, batch=batch), MemoryBudget(**budget), placement)
    options = GenerateOptions(max_new_tokens=new_tokens, greedy=True)
    if method == "accelerate":
        from lowmem.offload import reference

        return (yield from reference.run(plan, prompt, options)).as_dict()
    receipt: Receipt | None = None
    for event in run(session, plan, *batched(prompt, options, batch), raw=True):
        if isinstance(event, Receipt):
            receipt = event
        elif isinstance(event, Chunk):
            yield Step(event.new_tokens, new_tokens, msg("Decoding"), "tokens")
        elif isinstance(event, Step):
            yield event
    assert receipt is not None  # every action ends in one
    return receipt.as_dict()
