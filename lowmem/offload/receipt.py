"""The receipt of an offloaded run: placement, bytes read, speed, and a Python snippet that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowmem.events import Receipt
from lowmem.fields import arguments, changed, literal
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.offload.estimate import SpeedEstimate
from lowmem.planning.plan import Plan
from lowmem.runtime.receipts import plan_snippet


def offload_receipt(
    receipt: Receipt, plan: Plan, speed: SpeedEstimate | None, read: int, loading: dict[str, int], snippet: str
) -> Receipt:
    """The session's receipt with the details of offloading.

    Args:
        speed: None if it could not be estimated.
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
            **_predicted(speed),
        },
        predicted_seconds=speed.seconds_per_token * _passes(receipt) if speed else 0.0,
        notes=receipt.notes if speed else (*receipt.notes, UNPREDICTED),
        # The peak includes loading.
        measured={m: max(count, loading.get(m, 0)) for m, count in receipt.measured.items()},
        snippet=snippet,
    )


def _passes(receipt: Receipt) -> float:
    """Passes over the weights: the prompt's, and one for each token after the first of a sequence."""
    return receipt.new_tokens / max(1, int(receipt.details.get("completions") or len(receipt.details["finish"])))


UNPREDICTED = msg("The time per token was not predicted, because this machine's disk is too slow to measure.")


def _predicted(speed: SpeedEstimate | None) -> dict[str, object]:
    if speed is None:
        return {}
    return {
        "bytes_per_token": speed.disk_bytes,
        "predicted_seconds_per_token": speed.seconds_per_token,
        "bound_by": speed.bound_by,
        "disk_bytes_per_second": speed.disk_rate,
    }


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


def repeat_snippet(plan: Plan, prompts: Sequence[str], options: GenerateOptions, raw: bool, force: bool = False) -> str:
    """Python code that plans and runs the same prompts again."""
    more = ", force=True" if force else ""
    return (
        f"from lowmem.offload.run import run\n{plan_snippet(plan)}"
        f"options = lowmem.GenerateOptions({arguments(changed(options))})\n"
        f"prompts = {literal(list(prompts), 'prompts.json')}\n"
        f"for event in run(session, plan, prompts, options, raw={raw}{more}):\n"
        "    if isinstance(event, lowmem.Chunk):\n"
        '        print(event.text, end="", flush=True)\n'
    )
