"""Run receipts: what an action cost, and the Python code that repeats it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lowmem.events import Chunk, Completion, Receipt
from lowmem.fields import arguments, changed, literal
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.units import format_bytes


def load_receipt(plan: Plan, seconds: float, peak: dict[str, int], notes: list[str], folder: Path) -> Receipt:
    # Loading holds no cache and renders no template yet: only weights and the tensor being read.
    predicted = reestimate(plan, context=1, batch=1, prefill_chunk=1, chat=False).predicted
    if plan.spec.dequantized:
        held = plan.precision_label
        notes = [
            *notes,
            msg(
                "{kinds} weights were dequantized as they were read: they run as {held}.",
                kinds=plan.spec.dequantized,
                held=held,
            ),
        ]
    return _receipt(
        "load",
        plan,
        seconds,
        **_peaks(predicted, peak),
        disk_bytes=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        notes=tuple(notes),
        snippet=load_snippet(plan),
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
        details={"completions": len(done), "batch": plan.batch},
    )


def with_prompt(
    receipt: Receipt, plan: Plan, prompt: object, options: GenerateOptions, raw: bool, force: bool = False
) -> Receipt:
    """`receipt` with the code of its call; `plan` is the resident plan."""
    more = arguments({name: True for name, on in (("raw", raw), ("force", force)) if on})
    call = (
        f"\noptions = lowmem.GenerateOptions({arguments(changed(options))})\n"
        f"prompt = {literal(prompt, 'prompt.json')}\n"
        f"for event in session.generate({', '.join(filter(None, ('prompt, options', more)))}):\n"
        "    if isinstance(event, lowmem.Chunk):\n"
        '        print(event.text, end="", flush=True)\n'
    )
    return replace(receipt, snippet=load_snippet(plan) + call)


def with_prompts(
    receipt: Receipt, plan: Plan, prompts: Sequence[str], options: GenerateOptions, **more: Any
) -> Receipt:
    """The same for many prompts; `more` are the other arguments of `Session.batch`."""
    more = {name: value for name, value in more.items() if value}
    call = (
        f"\noptions = lowmem.GenerateOptions({arguments(changed(options))})\n"
        f"prompts = {literal(list(prompts), 'prompts.json')}\n"
        f"for event in session.batch({', '.join(filter(None, ('prompts, options', arguments(more))))}):\n"
        "    if isinstance(event, lowmem.Completion):\n"
        "        print(event.text)\n"
    )
    return replace(receipt, snippet=load_snippet(plan) + call)


def load_snippet(plan: Plan) -> str:
    """Python code that plans and loads the same again: budget, precision, and the place of every block."""
    force = ", force=True" if plan.verdict == "over" else ""
    return plan_snippet(plan) + f"for event in session.load(plan{force}):\n    pass\n"


def plan_snippet(plan: Plan) -> str:
    """Python code that makes `session` and `plan`. A plan names every choice, so that nothing is left to the planner."""
    goal = {name: getattr(plan, name) for name in (field.name for field in fields(Goal))}
    placed = ""
    if plan.placement is not None:
        where = f"Placement({_runs(plan.placement.blocks)}, mapped={plan.placement.mapped})"
        placed = f"plan = reestimate(plan, placement={where})\n"
    imports = (
        "from lowmem.planning.estimate import reestimate\nfrom lowmem.planning.placement import Placement\n"
        if placed
        else ""
    )
    return (
        f"import lowmem\n{imports}\n"
        "session = lowmem.Session()\n"
        f"goal = lowmem.Goal({arguments(goal)})\n"
        f"budget = lowmem.MemoryBudget({arguments(plan.budget.as_dict())})\n"
        f"plan = session.plan_for({plan.spec.ref!r}, goal, budget)\n{placed}"
    )


def _runs(blocks: Sequence[str]) -> str:
    """A tuple of places as code, equal neighbours together: "('ram',) * 20 + ('disk',) * 4"."""
    return " + ".join(f"({place!r},) * {len(list(run))}" for place, run in itertools.groupby(blocks))


def _receipt(action: str, plan: Plan, seconds: float, **figures: Any) -> Receipt:
    return Receipt(action, plan.spec.name, plan.precision, plan.device, seconds, **figures)


def _peaks(predicted: dict[str, int], peak: dict[str, int]) -> dict[str, dict[str, int]]:
    """Predicted and measured peaks of the same memories."""
    return {"predicted": predicted, "measured": {memory: peak[memory] for memory in predicted if memory in peak}}
