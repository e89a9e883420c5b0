"""What the page may ask of offloading: plan, predict, run, compare. Thin; torch comes with the first run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, Cancelled, LowMemError
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.bandwidth import Unmeasured
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.models.source import local_folder
from lowmem.models.spec import ModelSpec
from lowmem.offload.estimate import SpeedEstimate, estimate_speed, largest_file
from lowmem.offload.plans import parse_blocks
from lowmem.offload.run import METHODS, BlockPlacement, batched, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.ui.service.engine import Engine

EXERCISE = tuple(method for method in METHODS if method != "auto")

CONTEXT = 512
MOST_TOKENS = 256
MOST_ANSWERS = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A visitor's wish.

    Args:
        disk_blocks, ram_blocks: lists like "0-5,9" or "all"; both "" leaves the placement to the budget.
        answers: at once; 0 for as many as pay within the budget.
    """

    model: str = "demo"
    disk_blocks: str = ""
    ram_blocks: str = ""
    answers: int = 1
    budget: MemoryBudget = UNLIMITED


class Depot:
    """Offloading for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._measuring = threading.Lock()

    def plan(self, ask: Ask) -> Plan:
        """The plan for a wish.

        Raises:
            DoesNotFit: the budget is below what one block at a time takes.
            BadInput, ModelNotFound and others: what is wrong with the wish.
        """
        if not 0 <= ask.answers <= MOST_ANSWERS:
            raise BadInput(f"{ask.answers:,} answers at once are not possible here.", f"Choose 0 to {MOST_ANSWERS}.")
        spec = self.engine.spec(ask.model)
        goal = Goal(context=CONTEXT, batch=max(1, ask.answers))
        return plan_for(self.engine.session, spec, goal, ask.budget, _where(ask, spec), maximize_batch=not ask.answers)

    def here(self, plan: Plan) -> bool:
        """Is the model on this machine?"""
        return _weights(plan.spec) is not None

    def speed(self, plan: Plan) -> SpeedEstimate | None:
        """Seconds per token, None while the model is not on this machine or the machine was not measured."""
        file = _weights(plan.spec)
        try:
            return estimate_speed(plan, file, None) if file else None
        except Unmeasured:
            return None

    def measure(self, plan: Plan, again: bool = False) -> SpeedEstimate | None:
        """As `speed`, but what was never measured is measured now, in a process of its own; some seconds.

        Not while the model computes: both would be slower than they are.
        """
        placement = plan.placement
        if placement is None or not self.here(plan) or self.engine.busy:
            return self.speed(plan)
        asked: dict[str, Any] = {
            "model": plan.spec.ref,
            "batch": plan.batch,
            "mapped": placement.mapped,
            "again": again,
        }
        asked |= {"disk": placement.indices("disk"), "in_ram": placement.indices("ram")}
        with self._measuring:
            if again or self.speed(plan) is None:
                for _ in run_isolated("measure_offload", asked):
                    pass
        return self.speed(plan)

    def run(
        self, ask: Ask, prompt: str, new_tokens: int, cancel: CancelToken
    ) -> Iterator[Step | Chunk | Completion | Receipt]:
        """Answer a prompt with the page's one model, which is loaded as planned; the receipt is the last event.

        One answer takes the likeliest tokens; several at once are drawn, or they would be the same.
        """
        plan = self.plan(ask)
        options = GenerateOptions(max_new_tokens=_checked(new_tokens), greedy=plan.batch == 1)
        for event in run(self.engine.session, plan, *batched(prompt, options, plan.batch), cancel, raw=True):
            if isinstance(event, Receipt):
                self.engine.note(event)
            yield event

    def compare(
        self, ask: Ask, prompt: str, new_tokens: int, cancel: CancelToken, methods: Sequence[str] = EXERCISE
    ) -> Iterator[Step | dict[str, Any]]:
        """Every method in a process of its own: a dictionary each, of its receipt or of its "error"."""
        if unknown := [method for method in methods if method not in METHODS]:
            raise BadInput(f"There is no method {unknown[0]!r}.", f"Choose among {', '.join(METHODS)}.")
        self.engine.spec(ask.model)  # refuses paths that strangers may not name
        given = {"model": ask.model, "prompt": prompt, "new_tokens": _checked(new_tokens), "context": CONTEXT}
        for method in dict.fromkeys(methods):
            yield from _one(method, given | {"budget": self.engine.child_budget(ask.budget).as_dict()}, cancel)


def _one(method: str, arguments: dict[str, Any], cancel: CancelToken) -> Iterator[Step | dict[str, Any]]:
    try:
        for event in run_isolated("offload", {"method": method, **arguments}, cancel):
            if isinstance(event, Finished):
                yield {"method": method, **event.value}
            else:
                yield Step(event.done, event.total, f"{method}: {event.note}", event.unit)
    except Cancelled:
        raise
    except LowMemError as error:
        yield {"method": method, "error": str(error)}


def _where(ask: Ask, spec: ModelSpec) -> BlockPlacement:
    return BlockPlacement(
        parse_blocks(ask.ram_blocks.strip() or None, spec.layers),
        parse_blocks(ask.disk_blocks.strip() or None, spec.layers),
    )


def _checked(new_tokens: int) -> int:
    if not 1 <= new_tokens <= MOST_TOKENS:
        raise BadInput(f"{new_tokens:,} new tokens are not possible here.", f"Choose 1 to {MOST_TOKENS}.")
    return int(new_tokens)


def _weights(spec: ModelSpec) -> Path | None:
    """A weight file of a model that is on this machine."""
    folder = local_folder(spec.ref)
    return largest_file(folder) if folder else None
