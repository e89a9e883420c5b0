"""What to try next when memory runs out: each rung is a function `Plan -> Plan | None`.

A rung changes one thing, the cheapest for the person first, and returns None when it has
nothing left to give. `next_rung` walks them in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowmem.planning import exported, offloading
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan
from lowmem.planning.precision import candidates

MINIMUM_CONTEXT = 512

Rung = Callable[[Plan], Plan | None]


def shorter_context(plan: Plan) -> Plan | None:
    """Half the context, down to 512 tokens."""
    if plan.context <= MINIMUM_CONTEXT:
        return None
    context = max(MINIMUM_CONTEXT, plan.context // 2)
    return reestimate(plan, context=context, reason=f"Context shortened to {context:,} tokens.")


def quantized_kv(plan: Plan) -> Plan | None:
    """The KV cache in int8."""
    if plan.kv != "same" or plan.backend == "onnx":  # whose cache is fp32
        return None
    return reestimate(plan, kv="int8", reason="KV cache stored in int8.")


def fewer_bits(plan: Plan) -> Plan | None:
    """The next precision of the same device that takes less memory for weights."""
    if plan.spec.exported:
        return None
    device = plan.place
    for precision in candidates(plan.hardware, device, plan.spec):
        smaller = reestimate(
            plan, precision=precision, backend="torch", reason=f"Weights in {precision} instead of {plan.precision}."
        )
        if smaller.main.share("weights") < 0.9 * plan.main.share("weights"):
            return smaller
    return None


def offload(plan: Plan) -> Plan | None:
    """Blocks that do not fit stream from RAM or disk: slow, but only two of them need room."""
    if plan.spec.exported:
        return None
    found = offloading.offloaded(plan) if plan.placement is None else offloading.further(plan)
    if found is None or found.placement is None or not found.placement.streamed(found.place.kind):
        return None
    return replace(found, reason=f"Offloaded: {found.placement.sentence()}.")


def other_memory(plan: Plan) -> Plan | None:
    """From the GPU's memory to RAM, computing on the CPU: slow, but there is more of it."""
    cpu = plan.hardware.cpu
    if plan.device == cpu.key:
        return None
    precision = candidates(plan.hardware, cpu, plan.spec)[0]
    return reestimate(
        plan,
        device=cpu.key,
        precision=precision,
        reason="Moved from the GPU to the CPU, where there is more memory; slower.",
    )


def smaller_model(plan: Plan) -> Plan | None:
    """The next smaller model of the catalog that is of the same use."""
    from lowmem.models.catalog import CATALOG

    smaller = [entry.spec() for entry in CATALOG if not entry.gated and entry.chat]
    smaller = [spec for spec in smaller if spec.parameters < 0.8 * plan.spec.parameters]
    if not smaller:
        return None
    spec = max(smaller, key=lambda s: s.parameters)
    return reestimate(
        plan,
        spec=spec,
        # What a quantized checkpoint runs in, others do not.
        precision=candidates(plan.hardware, plan.place, spec)[0] if plan.precision == "stored" else plan.precision,
        backend="torch" if exported.refusal(spec) else plan.backend,
        context=min(plan.context, spec.context),
        reason=f"{spec.name} instead of {plan.spec.name}.",
    )


def without_graph(plan: Plan, why: str) -> Plan | None:
    """The same on torch; None where the graph was asked for, or is all there is."""
    return reestimate(plan, backend="torch", or_torch=False, reason=why) if plan.or_torch else None


LADDER: tuple[Rung, ...] = (shorter_context, quantized_kv, fewer_bits, offload, other_memory, smaller_model)

SAME_MODEL: tuple[Rung, ...] = LADDER[:-1]


def next_rung(plan: Plan, ladder: tuple[Rung, ...] = LADDER) -> Plan | None:
    """The first rung that saves memory on the device that was short; None at the bottom."""
    for rung in ladder:
        lower = rung(plan)
        if lower is not None and _saves(lower, plan):
            return lower
    return None


def lower_load(plan: Plan) -> Plan | None:
    """The next rung when loading itself ran out: only what makes the weights smaller, or moves them, helps."""
    return next_rung(plan, (fewer_bits, offload, other_memory, smaller_model))


def descend(plan: Plan, ladder: tuple[Rung, ...] = SAME_MODEL) -> Plan:
    """Walk down until the plan is within its budget, or the ladder ends; the reasons add up."""
    steps: dict[str, str] = {}
    first = plan.reason
    while plan.verdict == "over" and (lower := next_rung(plan, ladder)) is not None:
        # Half the context and half again reads as one step: a later sentence replaces its like.
        steps[lower.reason.split()[0]] = lower.reason
        plan = lower
    return replace(plan, reason=" ".join(filter(None, (first, *steps.values()))))


def remedies(plan: Plan, ladder: tuple[Rung, ...] = LADDER) -> tuple[Plan, ...]:
    """What would bring an over-budget plan within its budget by one kind of change: a plan per rung that can."""
    found = []
    for rung in ladder:
        lower = descend(replace(plan, reason=""), (rung,))
        if lower.verdict != "over":
            found.append(lower)
    return tuple(found)


def _saves(lower: Plan, plan: Plan) -> bool:
    return lower.device != plan.device or lower.main.peak < plan.main.peak
