"""Plans with a placement of blocks, by budget or as requested. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from lowmem.errors import BadInput, DoesNotFit, Unsupported
from lowmem.messages import msg
from lowmem.planning.estimate import reestimate
from lowmem.planning.model_bytes import compute_dtype
from lowmem.planning.offloading import offload_precision, offloaded, smallest
from lowmem.planning.placement import Placement, stored_block_bytes
from lowmem.planning.plan import Plan
from lowmem.units import format_bytes

MAX_BATCH = 256


def place_by_budget(plan: Plan) -> Plan:
    """`plan` with as many resident blocks as its budget holds.

    Raises:
        DoesNotFit: not even one block at a time fits; the hint says which budget does.
        Unsupported: the model cannot run block by block.
    """
    found = offloaded(plan)
    if found is not None and found.placement is not None:
        streams = found.placement.streamed(found.place.kind)
        reason = (
            msg("All blocks fit.")
            if not streams
            else msg("{placement}, as the budget allows.", placement=found.placement.sentence())
        )
        return replace(found, reason=reason)
    least = smallest(plan)
    over = next((estimate for estimate in least.estimates if estimate.verdict == "over"), None)
    if over is None:
        raise Unsupported(
            msg("{model} cannot run block by block on {place}.", model=plan.spec.name, place=plan.place.name),
            msg("Choose another model."),
        )
    memory = msg("GPU memory") if over.memory == "vram" else "RAM"
    raise DoesNotFit(
        msg(
            "Even block by block, {model} needs {peak} of {memory}, more than the budget of {limit}.",
            model=plan.spec.name,
            peak=format_bytes(over.peak),
            memory=memory,
            limit=format_bytes(over.limit),
        ),
        msg("Raise the budget to at least {peak}, or shorten the context.", peak=format_bytes(over.peak * 1.01)),
    )


def place_blocks(plan: Plan, placement: Placement, may_map: bool = True) -> Plan:
    """`plan` with this placement; blocks on disk are memory-mapped if `may_map` and the RAM budget holds them."""
    chosen = replace(
        plan,
        precision=offload_precision(plan),
        reason=msg("As requested: {placement}.", placement=placement.sentence()),
    )
    if may_map and _may_map(chosen) and placement.indices("disk"):
        mapped = reestimate(chosen, placement=replace(placement, mapped=True))
        if mapped.verdict != "over":
            why = msg("The blocks on disk fit in the RAM budget, so they are memory-mapped and count as RAM.")
            return replace(mapped, reason=f"{mapped.reason} {why}")
    return reestimate(chosen, placement=placement)


def _may_map(plan: Plan) -> bool:
    """Whether blocks can be memory-mapped: on a CPU that computes in the stored dtype."""
    dtype = compute_dtype(plan.precision, plan.place.dtypes)
    return plan.place.kind == "cpu" and all(
        tensor.dtype == dtype and not tensor.decoded for tensor in plan.spec.tensors
    )


def largest_batch(plan: Plan, place: Callable[[Plan], Plan]) -> Plan:
    """`plan` placed for the batch size with the highest throughput, up to `MAX_BATCH`.

    Each pass over the weights serves all sequences of a batch, but a larger KV cache leaves room for fewer resident
    blocks. The batch size doubles as long as it fits and increases sequences per byte moved.

    Args:
        place: places the blocks of a plan, such as `place_by_budget`.

    Raises:
        DoesNotFit, Unsupported: see `place`; not even one sequence fits.
    """
    best = place(reestimate(plan, batch=1))
    size = 2
    while size <= MAX_BATCH:
        try:
            tried = place(reestimate(plan, batch=size))
        except DoesNotFit:
            break
        if tried.verdict == "over":
            break
        if size / _pass_bytes(tried) > best.batch / _pass_bytes(best):
            best = tried
        size *= 2
    return replace(
        best,
        reason=msg(
            "{reason} Each pass over the weights serves {batch} sequences.", reason=best.reason, batch=best.batch
        ),
    )


def _pass_bytes(plan: Plan) -> float:
    """Cost of a pass in bytes of streamed blocks; resident memory is about ten times as fast."""
    sizes = stored_block_bytes(plan.spec)
    streamed = plan.placement.streamed(plan.place.kind) if plan.placement else ()
    return sum(sizes[index] for index in streamed) + sum(sizes) / 10


def parse_blocks(text: str | None, layers: int) -> tuple[int, ...] | None:
    """Block indices from a list such as "0-2,7" or "all"; None for None.

    Raises:
        BadInput: not such a list, or a block that the model does not have.
    """
    if text is None:
        return None
    if text.strip() == "all":
        return tuple(range(layers))
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise BadInput(
                msg("{part!r} is not a block.", part=part), msg("Use numbers and ranges such as 0-5,9, or all.")
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= layers or first > last:
            raise BadInput(
                msg("There are no blocks {part}.", part=part),
                msg("The model has blocks 0 to {difference}.", difference=layers - 1),
            )
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))
