"""Plans with a placement: by budget, or as somebody chose it; and the number that would do where none fits.

Decides, and says why; imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from lowmem.errors import BadInput, DoesNotFit, Unsupported
from lowmem.planning.estimate import reestimate
from lowmem.planning.model_bytes import compute_dtype
from lowmem.planning.offloading import offload_precision, offloaded, smallest
from lowmem.planning.placement import Placement, counted, stored_block_bytes
from lowmem.planning.plan import Plan
from lowmem.units import format_bytes

LARGEST_BATCH = 256


def by_budget(plan: Plan) -> Plan:
    """`plan` with as many blocks at home as its budgets allow.

    Raises:
        DoesNotFit: not even one block at a time fits; says which budget would do.
        Unsupported: the model cannot be taken apart.
    """
    found = offloaded(plan)
    if found is not None and found.placement is not None:
        streams = found.placement.streamed(found.place.kind)
        reason = "All blocks fit." if not streams else f"{found.placement.sentence()}: what the budget holds stays."
        return replace(found, reason=reason)
    least = smallest(plan)
    over = next((estimate for estimate in least.estimates if estimate.verdict == "over"), None)
    if over is None:
        raise Unsupported(f"{plan.spec.name} cannot run block by block on {plan.place.name}.", "Choose another model.")
    memory = "GPU memory" if over.memory == "vram" else "RAM"
    raise DoesNotFit(
        f"Even one block at a time, {plan.spec.name} needs {format_bytes(over.peak)} of {memory}; the budget is "
        f"{format_bytes(over.limit)}.",
        f"Allow at least {format_bytes(over.peak * 1.01)}, or shorten the context.",
    )


def placed(plan: Plan, placement: Placement, may_map: bool = True) -> Plan:
    """`plan` with the blocks where somebody wants them; on disk in place where that is allowed and the RAM budget holds them."""
    chosen = replace(plan, precision=offload_precision(plan), reason=f"As chosen: {placement.sentence()}.")
    if may_map and _may_map(chosen) and placement.indices("disk"):
        mapped = reestimate(chosen, placement=replace(placement, mapped=True))
        if mapped.verdict != "over":
            why = "The RAM budget holds them, so they are used in place and count as RAM."
            return replace(mapped, reason=f"{mapped.reason} {why}")
    return reestimate(chosen, placement=placement)


def _may_map(plan: Plan) -> bool:
    """Blocks can be used in place on a CPU that computes in the dtype that is stored."""
    dtype = compute_dtype(plan.precision, plan.place.dtypes)
    return plan.place.kind == "cpu" and all(tensor.dtype == dtype for tensor in counted(plan.spec))


def most_answers(plan: Plan, place: Callable[[Plan], Plan]) -> Plan:
    """`plan` placed for as many sequences at once as pay: one pass of the weights serves them all.

    More sequences take room from blocks at home, which then have to move; what counts is sequences per byte of a pass.

    Args:
        place: places a plan, such as `by_budget`.

    Raises:
        DoesNotFit, Unsupported: see `place`; not even one sequence fits.
    """
    best = place(reestimate(plan, batch=1))
    size = 2
    while size <= LARGEST_BATCH:
        try:
            tried = place(reestimate(plan, batch=size))
        except DoesNotFit:
            break
        if tried.verdict == "over":
            break
        if size / _pass_bytes(tried) > best.batch / _pass_bytes(best):
            best = tried
        size *= 2
    return replace(best, reason=f"{best.reason} {best.batch} answers at once share each pass.")


def _pass_bytes(plan: Plan) -> float:
    """What a pass moves, in bytes from where streamed blocks come from; memory at home is about ten times as fast."""
    sizes = stored_block_bytes(plan.spec)
    streamed = plan.placement.streamed(plan.place.kind) if plan.placement else ()
    return sum(sizes[index] for index in streamed) + sum(sizes) / 10


def blocks(text: str | None, layers: int) -> tuple[int, ...] | None:
    """`"0-2,7" -> (0, 1, 2, 7)`, "all", None for None.

    Raises:
        BadInput: not such a list, or a block that there is not.
    """
    if text is None:
        return None
    if text.strip() == "all":
        return tuple(range(layers))
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise BadInput(f"{part!r} is no block.", "Write numbers and ranges like 0-5,9, or all.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= layers or first > last:
            raise BadInput(f"There are no blocks {part}.", f"The model has blocks 0 to {layers - 1}.")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))
