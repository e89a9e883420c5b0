"""The receipt of an offloaded run: placement, bytes read, speed, and a Python snippet that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem.events import Receipt
from lowmem.fields import changed
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.offload.estimate import SpeedEstimate
from lowmem.planning.placement import resident_place
from lowmem.planning.plan import Plan

LONGEST_PROMPT = 600


def offload_receipt(
    receipt: Receipt, plan: Plan, speed: SpeedEstimate, read: int, loading: dict[str, int], snippet: str
) -> Receipt:
    """The session's receipt with the details of offloading.

    Args:
        read: bytes read from offloaded blocks for this answer.
        loading: peak bytes of loading the model, if it was loaded for this answer.
    """
    return replace(
        receipt,
        action="offload",
        details={
            **receipt.details,
            **_pace(receipt),
            "placement": plan.placement.sentence() if plan.placement else msg("all blocks resident"),
            "blocks": list(plan.placement.blocks) if plan.placement else [],
            "mapped": bool(plan.placement and plan.placement.mapped),
            "bytes_read": read,
            "bytes_per_token": speed.disk_bytes,
            "predicted_seconds_per_token": speed.seconds_per_token,
            "bound_by": speed.bound_by,
            "disk_bytes_per_second": speed.disk_rate,
        },
        # The peak includes loading.
        measured={m: max(count, loading.get(m, 0)) for m, count in receipt.measured.items()},
        snippet=snippet,
    )


def _pace(receipt: Receipt) -> dict[str, float]:
    """Measured seconds per pass, which generates a token for every sequence."""
    pace = {"tokens_per_second": receipt.decode_tps}
    if receipt.action == "generate" and receipt.decode_tps:
        pace["seconds_per_token"] = len(receipt.details["finish"]) / receipt.decode_tps
    elif receipt.action == "batch" and receipt.new_tokens:
        # Includes the pass over the prompts.
        steps = -(-receipt.new_tokens // int(receipt.details["completions"]))
        pace["seconds_per_token"] = receipt.seconds / steps
    return pace


def repeat_snippet(plan: Plan, prompts: Sequence[str], options: GenerateOptions, raw: bool) -> str:
    """Python code that plans and runs the same prompts again."""
    budget = ", ".join(f"{memory}={limit}" for memory, limit in plan.budget.as_dict().items())
    shown = list(prompts) if sum(map(len, prompts)) <= LONGEST_PROMPT else ["..."]
    return (
        "import lowmem\n"
        "from lowmem.offload.run import BlockPlacement, plan_for, run\n\n"
        "session = lowmem.Session()\n"
        f"goal = lowmem.Goal(context={plan.context}, batch={plan.batch}, precision={_precision(plan)!r}, "
        f"device={plan.device!r})\n"
        f"plan = plan_for(session, {plan.spec.ref!r}, goal, lowmem.MemoryBudget({budget}), placement={_where(plan)})\n"
        f"options = lowmem.GenerateOptions({_arguments(changed(options))})\n"
        f"for event in run(session, plan, {shown!r}, options, raw={raw}):\n"
        "    if isinstance(event, lowmem.Chunk):\n"
        '        print(event.text, end="", flush=True)\n'
    )


def _precision(plan: Plan) -> str:
    return "auto" if plan.precision == "stored" else plan.precision


def _where(plan: Plan) -> str:
    if plan.placement is None:
        return "BlockPlacement(resident=True)"
    places = {"disk": plan.placement.indices("disk")}
    if resident_place(plan.place.kind) != "ram":
        places["ram"] = plan.placement.indices("ram")
    lists = {place: list(indices) for place, indices in places.items()}
    return f"BlockPlacement({_arguments(lists)}, may_map={plan.placement.mapped})"


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
