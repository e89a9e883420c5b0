"""Run receipts: what an action cost, and the Python code that repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.events import Chunk, Completion, Receipt
from lowmem.fields import changed
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan
from lowmem.units import format_bytes


def load_receipt(plan: Plan, seconds: float, peak: dict[str, int], notes: list[str], folder: Path) -> Receipt:
    # Loading holds no cache yet, only weights and the tensor being read.
    predicted = reestimate(plan, context=1, batch=1, prefill_chunk=1).predicted
    return _receipt(
        "load",
        plan,
        seconds,
        **_peaks(predicted, peak),
        disk_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        notes=tuple(notes),
        snippet=_load_snippet(plan),
    )


def unload_receipt(plan: Plan, seconds: float, taken: int, returned: int) -> Receipt:
    share = returned / taken if taken > 0 else 1.0
    return _receipt(
        "unload",
        plan,
        seconds,
        notes=(
            msg(
                "Freed {returned}, {share:.0%} of what loading took.",
                returned=format_bytes(max(0, returned)),
                share=share,
            ),
        ),
        details={"taken_bytes": taken, "returned_bytes": returned, "returned_share": share},
    )


def generate_receipt(
    plan: Plan, seconds: float, last: Sequence[Chunk], peak: dict[str, int], notes: list[str]
) -> Receipt:
    """`last` is the final chunk of each sequence; speeds add up over sequences decoded together."""
    first = last[0] if last else Chunk("")
    return _receipt(
        "generate",
        plan,
        seconds,
        **_peaks(plan.predicted, peak),
        prompt_tokens=first.prompt_tokens,
        new_tokens=sum(chunk.new_tokens for chunk in last),
        seconds_to_first=first.seconds_to_first,
        prefill_tps=first.prefill_tps,
        decode_tps=sum(chunk.decode_tps for chunk in last),
        notes=tuple(notes),
        details={"context": plan.context, "kv": plan.cache_type, "finish": [chunk.finish for chunk in last]},
    )


def batch_receipt(plan: Plan, seconds: float, done: Sequence[Completion], peak: dict[str, int]) -> Receipt:
    tokens = sum(completion.new_tokens for completion in done)
    return _receipt(
        "batch",
        plan,
        seconds,
        **_peaks(plan.predicted, peak),
        new_tokens=tokens,
        decode_tps=tokens / seconds if seconds else 0.0,
        prompt_tokens=sum(completion.prompt_tokens for completion in done),
        snippet=_load_snippet(plan),
        details={"completions": len(done), "batch": plan.batch},
    )


def with_prompt(receipt: Receipt, plan: Plan, prompt: object, options: GenerateOptions, raw: bool) -> Receipt:
    """`receipt` with the code of its call; `plan` is the resident plan."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed(options).items())
    call = (
        f"\noptions = lowmem.GenerateOptions({arguments})\n"
        f"for event in session.generate({_short(prompt)}, options{', raw=True' if raw else ''}):\n"
        "    if isinstance(event, lowmem.Chunk):\n"
        '        print(event.text, end="", flush=True)\n'
    )
    return replace(receipt, snippet=_load_snippet(plan) + call)


def _load_snippet(plan: Plan) -> str:
    goal = (
        f"lowmem.Goal(context={plan.context}, precision={plan.precision!r}, device={plan.device!r}, cache_type={plan.cache_type!r}, "
        f"backend={plan.backend!r})"
    )
    return (
        "import lowmem\n\n"
        "session = lowmem.Session()\n"
        "hardware = session.hardware()\n"
        f"goal = {goal}\n"
        f"plan = lowmem.plan(lowmem.read_spec({plan.spec.ref!r}), hardware, lowmem.MemoryBudget.detect(hardware), goal)\n"
        "for event in session.load(plan):\n"
        "    pass\n"
    )


def _short(prompt: object) -> str:
    text = repr(prompt)
    return text if len(text) <= 600 else repr("...")


def _receipt(action: str, plan: Plan, seconds: float, **figures: Any) -> Receipt:
    return Receipt(action, plan.spec.name, plan.precision, plan.device, seconds, **figures)


def _peaks(predicted: dict[str, int], peak: dict[str, int]) -> dict[str, dict[str, int]]:
    """Predicted and measured peaks of the same memories."""
    return {"predicted": predicted, "measured": {memory: peak[memory] for memory in predicted if memory in peak}}
