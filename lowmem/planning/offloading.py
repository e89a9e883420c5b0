"""Plans whose blocks do not all fit: which of them to offload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowmem.planning.estimate import reestimate
from lowmem.planning.placement import (
    Placement,
    all_resident,
    resident_place,
    spread,
    stored_block_bytes,
)
from lowmem.planning.plan import Plan
from lowmem.planning.precision import available
from lowmem.precisions import PRECISIONS


def offloaded(plan: Plan) -> Plan | None:
    """`plan` with as many resident blocks as its budget allows, and the others in RAM before disk.

    None if even one block at a time does not fit, or if the model's blocks are unknown.
    """
    kind = plan.place.kind
    if kind == "mps" or plan.spec.layers < 1 or len([s for s in stored_block_bytes(plan.spec) if s]) < plan.spec.layers:
        return None
    # Only torch's modules can be emptied and filled again.
    base = replace(plan, precision=offload_precision(plan), placement=None, backend="torch", or_torch=False)
    return _most_resident(base, _on_cpu if kind == "cpu" else _on_gpu)


def further(plan: Plan) -> Plan | None:
    """An offloaded plan with half as many resident blocks; None if there are none left."""
    if plan.placement is None:
        return None
    count = plan.placement.blocks.count(resident_place(plan.place.kind))
    place = _on_cpu if plan.place.kind == "cpu" else _on_gpu
    return reestimate(plan, placement=place(plan, count // 2)) if count else None


def smallest(plan: Plan) -> Plan:
    """`plan` with every block on disk, which needs the least memory."""
    return reestimate(plan, precision=offload_precision(plan), placement=Placement(("disk",) * plan.spec.layers))


def offload_precision(plan: Plan) -> str:
    """The precision of an offloaded plan: its compute dtype, since blocks stream in their stored format."""
    if plan.spec.quantization:
        return "stored"
    stored = {tensor.dtype for tensor in plan.spec.tensors if len(tensor.shape) > 1}
    if plan.precision in PRECISIONS and PRECISIONS[plan.precision].dtype:  # not "auto"
        return plan.precision
    best = plan.place.dtypes[0]
    if plan.place.kind == "cpu" and stored == {"bf16"} and "bf16" in plan.place.dtypes:
        return "bf16"
    return best if available(best, plan.hardware, plan.device, plan.spec) is None else "fp32"


def _on_cpu(plan: Plan, count: int) -> Placement:
    """`count` blocks in RAM, the others on disk."""
    blocks = ["disk"] * plan.spec.layers
    for index in spread(count, plan.spec.layers):
        blocks[index] = "ram"
    return Placement(tuple(blocks))


def _on_gpu(plan: Plan, count: int) -> Placement:
    """`count` blocks on the GPU; of the others as many in RAM as fit."""
    blocks = ["disk"] * plan.spec.layers
    for index in spread(count, plan.spec.layers):
        blocks[index] = "gpu"
    others = [index for index, place in enumerate(blocks) if place == "disk"]

    def in_ram(count: int) -> Placement:
        near = {others[number] for number in spread(count, len(others))}
        return Placement(tuple("ram" if index in near else place for index, place in enumerate(blocks)))

    def fits(count: int) -> bool:
        ram = reestimate(plan, placement=in_ram(count)).estimate("ram")
        return ram is not None and ram.verdict != "over"

    return in_ram(_largest(0, len(others), fits))


def _most_resident(plan: Plan, place: Callable[[Plan, int], Placement]) -> Plan | None:
    """The plan with the most resident blocks that is within its budget; None if there is none."""
    everything = reestimate(plan, placement=all_resident(plan.spec, plan.place.kind))
    if everything.verdict != "over":
        return everything
    count = _largest(
        -1, plan.spec.layers - 1, lambda count: reestimate(plan, placement=place(plan, count)).verdict != "over"
    )
    return reestimate(plan, placement=place(plan, count)) if count >= 0 else None


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `high` that `fits`, by bisection; `low` if none above it does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
