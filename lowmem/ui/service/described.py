"""Plans for machines that are not here, for the page. Nothing is loaded or measured."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lowmem.fields import option
from lowmem.machine.described import describe_machine
from lowmem.messages import msg
from lowmem.planning.described import DescribedPlan, plan_described
from lowmem.planning.goal import Goal
from lowmem.planning.what_runs import Cell, what_runs
from lowmem.precisions import PRECISIONS
from lowmem.ui.service.engine import AUTO, Engine


@dataclass(frozen=True, slots=True)
class DescribedRequest:
    """A model, and the machine to plan it for: a card by name, or any GPU by its memory."""

    model: str = option(AUTO, msg("Model"), msg("A hub id, a folder, a .gguf file, or auto."))
    gpu: str = option("", msg("GPU"), msg("A card such as t4, 3060 or rtx-a2000; empty for any GPU of this memory."))
    vram: str = option("", msg("GPU memory"), msg("Such as 6G; empty for that of the card."))
    ram: str = option("", msg("RAM"), msg("Such as 32G; empty for 16 GB."))
    context: int = option(2048, msg("Context"), msg("Tokens of prompt and answer together."), low=64, high=1 << 20)
    precision: str = option(AUTO, msg("Precision"), msg("Fewer bits, less memory."), choices=(AUTO, *PRECISIONS))


class DescribedService:
    """Plans for described machines, with the models that a page's visitor may name."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def plan(self, request: DescribedRequest) -> DescribedPlan:
        """The best plan there.

        Raises:
            BadInput, NotAllowed and others: what is wrong with the request.
        """
        machine = describe_machine(request.gpu, request.vram, request.ram)
        spec = None if request.model in ("", AUTO) else self.engine.spec(request.model)
        context = min(request.context, spec.context) if spec and spec.context else request.context
        return plan_described(spec, machine, Goal(context=context, precision=request.precision))

    def what_runs(self, ram: str = "") -> tuple[Cell, ...]:
        """The models of the catalog on GPUs of 4 to 24 GB; takes about 3 s the first time."""
        return _what_runs(ram)


@functools.lru_cache(maxsize=8)
def _what_runs(ram: str) -> tuple[Cell, ...]:
    return tuple(what_runs(ram))
