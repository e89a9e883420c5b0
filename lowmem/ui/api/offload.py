"""Named endpoints of offloading, like those in `api`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lowmem.events import CancelToken, Receipt
from lowmem.machine.budget import MemoryBudget
from lowmem.ui.api.core import as_json, told, told_stream
from lowmem.ui.parts.bind import ENGINE, bounded, pump
from lowmem.ui.service.offloading import EXERCISE, Ask, Depot

Json = dict[str, Any]


def add_offload_endpoints(depot: Depot) -> None:
    """Add /offload_plan, /offload and /offload_compare to the Blocks that is being built."""
    plan = _plan(depot)
    gr.api(told(plan), api_name=plan.__name__, concurrency_limit=None)
    for stream in (_offload(depot), _compare(depot)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)


def _plan(depot: Depot) -> Callable[..., Json]:
    def offload_plan(
        model: str = "demo",
        ram: str = "",
        vram: str = "",
        disk_blocks: str = "",
        ram_blocks: str = "",
        answers: int = 1,
        again: bool = False,
    ) -> dict:
        """Where the blocks would live, and seconds per token where this machine was measured; loads nothing."""
        plan = depot.plan(Ask(model.strip(), disk_blocks, ram_blocks, answers, MemoryBudget.parse(ram, vram)))
        speed = depot.measure(plan, again)
        placement = {"blocks": list(plan.placement.blocks), "mapped": plan.placement.mapped} if plan.placement else None
        pace = (
            asdict(speed) | {"seconds_per_token": speed.seconds_per_token, "bound_by": speed.bound_by}
            if speed
            else None
        )
        return as_json(plan) | {"batch": plan.batch, "placement": placement, "speed": pace}

    return offload_plan


def _offload(depot: Depot) -> Callable[..., Iterator[Json]]:
    def offload(
        prompt: str,
        model: str = "demo",
        new_tokens: int = 32,
        ram: str = "",
        vram: str = "",
        disk_blocks: str = "",
        ram_blocks: str = "",
        answers: int = 1,
    ) -> Iterator[dict]:
        """Load with blocks where the budget, or a list like "0-5,9", says, and continue a text; last {"receipt": ...}."""
        bounded(prompt)
        ask, token = Ask(model.strip(), disk_blocks, ram_blocks, answers, MemoryBudget.parse(ram, vram)), CancelToken()
        yield from _as_json(depot.run(ask, prompt, new_tokens, token), token)

    return offload


def _compare(depot: Depot) -> Callable[..., Iterator[Json]]:
    def offload_compare(
        prompt: str,
        model: str = "demo",
        new_tokens: int = 16,
        ram: str = "",
        vram: str = "",
        methods: list | None = None,
    ) -> Iterator[dict]:
        """One prompt by every method, each in a process of its own; yields steps, and a receipt or "error" for each."""
        bounded(prompt)
        ask, token = Ask(model.strip(), budget=MemoryBudget.parse(ram, vram)), CancelToken()
        chosen = EXERCISE if methods is None else [str(method) for method in methods]
        yield from _as_json(depot.compare(ask, prompt, new_tokens, token, chosen), token)

    return offload_compare


def _as_json(events: Iterator[Any], token: CancelToken) -> Iterator[Json]:
    for gathered in pump(events, token):
        for event in gathered:
            if isinstance(event, Receipt):
                yield {"receipt": event.as_dict()}
            else:
                yield event if isinstance(event, dict) else asdict(event)
