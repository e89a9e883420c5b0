"""The fallback chain: what to try when memory runs out. Each fallback is a function `Plan -> Plan | None`.

A fallback changes one thing, and whatever follows from it: the plan it returns is whole, with nothing left over from another
model or device. It returns None when it cannot save any more. The chain is ordered by what costs the person least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lowmem.messages import join, msg
from lowmem.models.catalog import recommended
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported, offloading
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan
from lowmem.planning.precision import available, candidates
from lowmem.precisions import PRECISIONS

MINIMUM_CONTEXT = 512

Fallback = Callable[[Plan], Plan | None]


def shorter_context(plan: Plan) -> Plan | None:
    """Half the context, down to 512 tokens."""
    if plan.context <= MINIMUM_CONTEXT:
        return None
    context = max(MINIMUM_CONTEXT, plan.context // 2)
    return reestimate(plan, context=context, reason=msg("Context shortened to {context:,} tokens.", context=context))


def quantized_kv(plan: Plan) -> Plan | None:
    """The KV cache in int8."""
    if plan.cache_type != "same" or plan.backend == "onnx":  # a graph's cache is fp32
        return None
    return reestimate(plan, cache_type="int8", reason=msg("KV cache quantized to int8."))


def fewer_bits(plan: Plan) -> Plan | None:
    """The next precision on the same device with smaller weights. Offloaded blocks stream as they are stored."""
    if plan.spec.exported or plan.placement is not None:
        return None
    for precision in candidates(plan.hardware, plan.place, plan.spec):
        smaller = reestimate(
            plan,
            precision=precision,
            backend="torch",
            or_torch=False,
            reason=msg("Weights in {precision} instead of {wanted}.", precision=precision, wanted=plan.precision),
        )
        if smaller.main.share("weights") < 0.9 * plan.main.share("weights"):
            return smaller
    return None


def offload(plan: Plan) -> Plan | None:
    """Stream the blocks that do not fit from RAM or disk: slow, but only two of them need memory."""
    if plan.spec.exported:
        return None
    found = offloading.offloaded(plan) if plan.placement is None else offloading.further(plan)
    if found is None or found.placement is None or not found.placement.streamed(found.place.kind):
        return None
    return replace(found, reason=msg("Offloaded: {placement}.", placement=found.placement.sentence()))


def other_memory(plan: Plan) -> Plan | None:
    """From the GPU to the CPU: slower, but there is more RAM than GPU memory."""
    cpu = plan.hardware.cpu
    if plan.device == cpu.key:
        return None
    return reestimate(
        plan,
        device=cpu.key,
        precision=candidates(plan.hardware, cpu, plan.spec)[0],
        cache_type="same" if plan.cache_type == "ram" else plan.cache_type,
        placement=None,
        reason=msg("Moved from the GPU to the CPU, which has more memory but is slower."),
    )


def smaller_model(plan: Plan) -> Plan | None:
    """The best smaller chat model of the catalog that fits and needs less memory; else the smallest one."""
    entries = [entry for entry in recommended() if entry.parameters < 0.8 * plan.spec.parameters]
    for entry in entries:
        smaller = _for_model(plan, entry.spec())
        if smaller.verdict != "over" and smaller.main.peak < plan.main.peak:
            return smaller
    smallest = min(entries, key=lambda entry: entry.parameters, default=None)
    return _for_model(plan, smallest.spec()) if smallest else None


def _for_model(plan: Plan, spec: ModelSpec) -> Plan:
    """`plan` for another model, all resident, with what was chosen as far as it is valid there."""
    on_graph = plan.backend == "onnx" and exported.refusal(spec) is None
    backend = "onnx" if on_graph else "torch"
    keeps = backend in PRECISIONS[plan.precision].backends and not available(
        plan.precision, plan.hardware, plan.device, spec
    )
    # A graph of a quantized checkpoint becomes one of dense weights in the precision that graphs have.
    precision = plan.precision if keeps else "int8" if on_graph else candidates(plan.hardware, plan.place, spec)[0]
    window = min(plan.window, max(0, spec.context - plan.sinks - 1))
    return reestimate(
        plan,
        spec=spec,
        precision=precision,
        backend=backend,
        or_torch=on_graph and plan.or_torch and "torch" in PRECISIONS[precision].backends,
        placement=None,
        window=window,
        context=plan.context if window else min(plan.context, spec.context),
        prefill_chunk=min(plan.prefill_chunk, spec.context),
        reason=msg("{model} instead of {wanted}.", model=spec.name, wanted=plan.spec.name),
    )


def without_graph(plan: Plan, why: str) -> Plan | None:
    """The same plan on torch; None if the person chose the graph, or the model is one."""
    return reestimate(plan, backend="torch", or_torch=False, reason=why) if plan.or_torch else None


FALLBACKS: tuple[Fallback, ...] = (shorter_context, quantized_kv, fewer_bits, offload, other_memory, smaller_model)

SAME_MODEL: tuple[Fallback, ...] = FALLBACKS[:-1]

WHILE_LOADING: tuple[Fallback, ...] = (fewer_bits, offload, other_memory, smaller_model)
"""What helps when loading itself runs out of memory: smaller weights, or weights somewhere else."""


def next_fallback(plan: Plan, chain: tuple[Fallback, ...] = FALLBACKS) -> Plan | None:
    """The first plan of `chain` that needs less memory on the same device, or another device; None at its end."""
    for fallback in chain:
        lower = fallback(plan)
        if lower is not None and (lower.device != plan.device or lower.main.peak < plan.main.peak):
            return lower
    return None


def fall_back(plan: Plan, chain: tuple[Fallback, ...] = SAME_MODEL) -> Plan:
    """Apply fallbacks until the plan fits its budget or the chain ends; the reasons add up."""
    steps: dict[str, str] = {}
    first = plan.reason
    while plan.verdict == "over" and (lower := next_fallback(plan, chain)) is not None:
        # Halving the context twice reads as one step: a later sentence of the same kind replaces the earlier.
        steps[lower.reason.split()[0]] = lower.reason
        plan = lower
    return replace(plan, reason=join(" ", filter(None, (first, *steps.values()))))


def remedies(plan: Plan) -> tuple[Plan, ...]:
    """For a plan over its budget: the plans that fit after one kind of change."""
    changed = [fall_back(replace(plan, reason=""), (fallback,)) for fallback in FALLBACKS]
    return tuple(plan for plan in changed if plan.verdict != "over")
