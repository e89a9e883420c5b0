"""Offloading for the page: plan, estimate, run, compare. Torch is loaded by the first run."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, Cancelled, LowMemError
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.fields import option
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.rates import Unmeasured
from lowmem.messages import Message, msg
from lowmem.models.source import local_folder
from lowmem.models.spec import ModelSpec
from lowmem.offload.estimate import SpeedEstimate, estimate_speed, largest_file
from lowmem.offload.plans import parse_blocks
from lowmem.offload.run import METHODS, BlockPlacement, batched, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.ui.service.engine import Engine

COMPARED = tuple(method for method in METHODS if method != "auto")

CONTEXT = 512
MOST_TOKENS = 256
MOST_SEQUENCES = 64


@dataclass(frozen=True, slots=True)
class OffloadRequest:
    """A model to run within a budget, as a visitor entered it. Both lists empty leave the placement to the budget."""

    model: str = option("demo", msg("Model"), msg("A hub id, a folder or a .gguf file."))
    budget: MemoryBudget = UNLIMITED
    disk_blocks: str = option("", msg("Blocks on disk"), msg("Numbers and ranges such as 0-5,9; or all."))
    ram_blocks: str = option("", msg("Blocks in RAM"), msg("Numbers and ranges such as 0-5,9; or all."))
    num_return_sequences: int = option(
        1, msg("Sequences"), msg("Generated in parallel; 0 for automatic."), low=0, high=MOST_SEQUENCES
    )


class OffloadService:
    """Offloading for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._measuring = threading.Lock()

    def plan(self, request: OffloadRequest) -> Plan:
        """The plan for a request.

        Raises:
            DoesNotFit: the budget is too small even for one block at a time.
            BadInput, ModelNotFound and others: what is wrong with the request.
        """
        spec = self.engine.spec(request.model)
        goal = Goal(context=CONTEXT, batch=max(1, request.num_return_sequences))
        return plan_for(
            self.engine.session,
            spec,
            goal,
            self.engine.bounded(request.budget),
            _where(request, spec),
            maximize_batch=not request.num_return_sequences,
        )

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
        """As `speed`, but measures this machine first, in a child process, if it never was; takes some seconds.

        Not while the model computes: each would slow the other down.

        Raises:
            NotAllowed: a visitor asks to measure `again`.
        """
        if again:
            self.engine.access.require_owner(msg("Measuring this machine again"))
        if plan.placement is None or not self.here(plan) or self.engine.busy:
            return self.speed(plan)
        with self._measuring:
            for _ in self._measured(plan, CancelToken(), again):
                pass
        return self.speed(plan)

    def _measured(self, plan: Plan, cancel: CancelToken, again: bool = False) -> Iterator[Step]:
        """Measure what `speed` needs of this machine, unless it is known; a child process does, since torch takes part."""
        if plan.placement is None or not (again or self.speed(plan) is None):
            return
        measured = {
            "model": plan.spec.ref,
            "batch": plan.batch,
            "mapped": plan.placement.mapped,
            "again": again,
            "disk": plan.placement.indices("disk"),
            "in_ram": plan.placement.indices("ram"),
        }
        for event in run_isolated("measure_offload", measured, cancel, self.engine.child_budget(UNLIMITED)):
            if isinstance(event, Step):
                yield event

    def run(
        self, request: OffloadRequest, prompt: str, new_tokens: int, cancel: CancelToken
    ) -> Iterator[Step | Chunk | Completion | Receipt]:
        """Load the model as planned, as the page's resident model, and continue a prompt; the receipt comes last.

        One sequence is decoded greedily; several are sampled, or all would be the same.
        """
        plan = self.plan(request)
        options = GenerateOptions(max_new_tokens=_checked(new_tokens), greedy=plan.batch == 1)
        yield from self._measured(plan, cancel)
        events = run(self.engine.session, plan, *batched(prompt, options, plan.batch), cancel, raw=True)
        yield from self.engine.noted(events)

    def compare(
        self,
        request: OffloadRequest,
        prompt: str,
        new_tokens: int,
        cancel: CancelToken,
        methods: Sequence[str] = COMPARED,
    ) -> Iterator[Step | dict[str, Any]]:
        """Run every method in its own child process; yields a dictionary for each, of its receipt or of its "error"."""
        if unknown := [method for method in methods if method not in METHODS]:
            raise BadInput(
                msg("There is no method {unknown!r}.", unknown=unknown[0]),
                msg("Choose among {methods}.", methods=", ".join(METHODS)),
            )
        self.engine.spec(request.model)  # refuses models that this visitor may not name
        arguments = {"model": request.model, "prompt": prompt, "new_tokens": _checked(new_tokens), "context": CONTEXT}
        for method in dict.fromkeys(methods):
            yield from _one(method, arguments, self.engine.child_budget(request.budget), cancel)


def _one(
    method: str, arguments: dict[str, Any], budget: MemoryBudget, cancel: CancelToken
) -> Iterator[Step | dict[str, Any]]:
    try:
        arguments = {"method": method, **arguments, "budget": budget.as_dict()}
        for event in run_isolated("offload", arguments, cancel, budget):
            if isinstance(event, Finished):
                yield {"method": method, **event.value}
            else:
                yield Step(
                    event.done, event.total, Message("{method}: {note}", method=method, note=event.note), event.unit
                )
    except Cancelled:
        raise
    except LowMemError as error:
        yield {"method": method, "error": str(error)}


def _where(request: OffloadRequest, spec: ModelSpec) -> BlockPlacement:
    return BlockPlacement(
        parse_blocks(request.ram_blocks.strip() or None, spec.layers),
        parse_blocks(request.disk_blocks.strip() or None, spec.layers),
    )


def _checked(new_tokens: int) -> int:
    if not 1 <= new_tokens <= MOST_TOKENS:
        raise BadInput(
            msg("{new_tokens:,} new tokens are not possible here.", new_tokens=new_tokens),
            msg("Choose 1 to {most_tokens}.", most_tokens=MOST_TOKENS),
        )
    return int(new_tokens)


def _weights(spec: ModelSpec) -> Path | None:
    """A weight file of a model that is on this machine."""
    folder = local_folder(spec.ref)
    return largest_file(folder) if folder else None
