"""Plans whose blocks do not all fit: which ones go elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowmem.planning.estimate import reestimate
from lowmem.planning.placement import (
    Placement,
    all_at_home,
    counted,
    home,
    spread,
    stored_block_bytes,
)
from lowmem.planning.plan import Plan
from lowmem.planning.precision import available
from lowmem.precisions import PRECISIONS


def offloaded(plan: Plan) -> Plan | None:
    """`plan` with as many blocks at home as its budgets allow, and the others as near as possible.

    None when even one block at a time does not fit, or when the model's blocks are not known.
    """
    kind = plan.place.kind
    if kind == "mps" or plan.spec.layers < 1 or len([s for s in stored_block_bytes(plan.spec) if s]) < plan.spec.layers:
        return None
    # Only torch's modules can be filled and emptied.
    base = replace(plan, precision=offload_precision(plan), placement=None, backend="torch", or_torch=False)
    if kind == "cpu":
        return _most(base, lambda count: _on_cpu(base, count))
    return _most(base, lambda count: _on_gpu(base, count))


def further(plan: Plan) -> Plan | None:
    """An offloaded plan with half as many blocks at home; None when there is none left."""
    if plan.placement is None:
        return None
    count = plan.placement.blocks.count(home(plan.place.kind))
    place = _on_cpu if plan.place.kind == "cpu" else _on_gpu
    return reestimate(plan, placement=place(plan, count // 2)) if count else None


def smallest(plan: Plan) -> Plan:
    """`plan` with every block on disk: nothing takes less memory."""
    precision = offload_precision(plan)
    return reestimate(plan, precision=precision, placement=Placement(("disk",) * plan.spec.layers))


def offload_precision(plan: Plan) -> str:
    """What an offloaded model is computed in: what is stored stays as it is, so only the computation's dtype matters."""
    if plan.spec.quantization:
        return "stored"
    stored = {tensor.dtype for tensor in counted(plan.spec) if len(tensor.shape) > 1}
    if PRECISIONS[plan.precision].dtype:
        return plan.precision
    best = plan.place.dtypes[0]
    if plan.place.kind == "cpu" and stored == {"bf16"} and "bf16" in plan.place.dtypes:
        return "bf16"
    return best if available(best, plan.hardware, plan.device, plan.spec) is None else "fp32"


def _on_cpu(plan: Plan, count: int) -> Placement:
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
    low, high = 0, len(others)
    while low < high:
        middle = (low + high + 1) // 2
        tried = _in_ram(blocks, others, middle)
        ram = reestimate(plan, placement=tried).estimate("ram")
        low, high = (middle, high) if ram and ram.verdict != "over" else (low, middle - 1)
    return _in_ram(blocks, others, low)


def _in_ram(blocks: list[str], others: list[int], count: int) -> Placement:
    near = {others[place] for place in spread(count, len(others))}
    return Placement(tuple("ram" if index in near else place for index, place in enumerate(blocks)))


def _most(plan: Plan, place: Callable[[int], Placement]) -> Plan | None:
    """The plan with most blocks at home that is not over its budgets."""
    everything = reestimate(plan, placement=all_at_home(plan.spec, plan.place.kind))
    if everything.verdict != "over":
        return everything
    low, high = -1, plan.spec.layers - 1
    while low < high:
        middle = (low + high + 1) // 2
        tried = reestimate(plan, placement=place(middle))
        low, high = (middle, high) if tried.verdict != "over" else (low, middle - 1)
    return reestimate(plan, placement=place(low)) if low >= 0 else None
