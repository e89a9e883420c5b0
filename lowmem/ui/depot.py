"""What the page may ask of offloading: plan, predict, run, compare. Thin; torch comes with the first run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, Cancelled, LowMemError
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.models.source import local_folder
from lowmem.models.spec import ModelSpec
from lowmem.offload.command import blocks
from lowmem.offload.predict import Speed, predict
from lowmem.offload.run import METHODS, Where, plan_for, run
from lowmem.planning.goal import Goal, limits_from
from lowmem.planning.plan import Plan
from lowmem.runtime.isolated import Finished, run_isolated
from lowmem.ui.engine import Engine
from lowmem.units import parse_bytes

EXERCISE = tuple(method for method in METHODS if method != "auto")

CONTEXT = 512
MOST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Ask:
    """A visitor's wish.

    Args:
        ram, vram: budgets as sizes, "" for all that is free.
        disk_blocks, ram_blocks: lists like "0-5,9" or "all"; both "" leaves the placement to the budgets.
    """

    model: str = "demo"
    ram: str = ""
    vram: str = ""
    disk_blocks: str = ""
    ram_blocks: str = ""


class Depot:
    """Offloading for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def plan(self, ask: Ask) -> Plan:
        """The plan for a wish.

        Raises:
            DoesNotFit: the budget is below what one block at a time takes.
            BadInput, ModelNotFound and others: what is wrong with the wish.
        """
        spec = self.engine.spec(ask.model)
        ram, vram = self._budgets(ask)
        return plan_for(self.engine.session, spec, Goal(context=CONTEXT), ram, vram, _where(ask, spec))

    def _budgets(self, ask: Ask) -> tuple[int | None, int | None]:
        ram, vram = (parse_bytes(size) if size else None for size in (ask.ram, ask.vram))
        return ram, vram

    def speed(self, plan: Plan, again: bool = False) -> Speed | None:
        """Seconds per token, None while the model is not on this machine. The first time takes some seconds."""
        file = _weights(plan.spec)
        return predict(plan, file, again) if file else None

    def run(
        self, ask: Ask, prompt: str, new_tokens: int, cancel: CancelToken
    ) -> Iterator[Step | Chunk | Completion | Receipt]:
        """Answer a prompt with the page's one model, which is loaded as planned; the receipt is the last event."""
        options = GenerateOptions(max_new_tokens=_checked(new_tokens), greedy=True)
        for event in run(self.engine.session, self.plan(ask), [prompt], options, cancel, raw=True):
            if isinstance(event, Receipt):
                self.engine.note(event)
            yield event

    def compare(
        self, ask: Ask, prompt: str, new_tokens: int, cancel: CancelToken, methods: Sequence[str] = EXERCISE
    ) -> Iterator[Step | dict[str, Any]]:
        """Every method in a process of its own: a dictionary each, of its receipt or of its "error"."""
        self.engine.spec(ask.model)  # refuses paths that strangers may not name
        ram, vram = self._budgets(ask)
        # The page's own process holds memory that the jobs cannot have.
        ram = limits_from(self.engine.hardware(), ram).ram - self.engine.snapshot().process_bytes
        for method in methods:
            arguments = {
                "model": ask.model, "method": method, "prompt": prompt, "new_tokens": _checked(new_tokens),
                "ram": ram, "vram": vram, "context": CONTEXT,
            }  # fmt: skip
            yield from _one(method, arguments, cancel)


def _one(method: str, arguments: dict[str, Any], cancel: CancelToken) -> Iterator[Step | dict[str, Any]]:
    try:
        for event in run_isolated("lowmem.offload.run:job", arguments, cancel):
            if isinstance(event, Finished):
                yield {"method": method, **event.value}
            else:
                yield Step(event.done, event.total, f"{method}: {event.note}", event.unit)
    except Cancelled:
        raise
    except LowMemError as error:
        yield {"method": method, "error": str(error)}


def _where(ask: Ask, spec: ModelSpec) -> Where:
    return Where(
        blocks(ask.ram_blocks.strip() or None, spec.layers), blocks(ask.disk_blocks.strip() or None, spec.layers)
    )


def _checked(new_tokens: int) -> int:
    if not 1 <= new_tokens <= MOST_TOKENS:
        raise BadInput(f"{new_tokens:,} new tokens are not possible here.", f"Choose 1 to {MOST_TOKENS}.")
    return int(new_tokens)


def _weights(spec: ModelSpec) -> Path | None:
    """A weight file of a model that is on this machine."""
    folder = local_folder(spec.ref)
    return next(iter(sorted(folder.glob("*.safetensors"))), None) if folder else None
