"""Choose model, precision and context for a machine and a budget, and say why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lowmem.errors import BadInput, Unsupported
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.cache import KV_STORAGES
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.ladder import descend
from lowmem.planning.model_bytes import weight_bytes
from lowmem.planning.plan import BACKENDS, Declined, Plan
from lowmem.planning.precision import available, candidates, device_of, storage_refusal
from lowmem.precisions import PRECISIONS
from lowmem.units import GB, format_bytes

COMFORTABLE_CONTEXT = 8192
"""Automatic context grows up to this while it costs nothing that matters."""

CPU_WEIGHTS_CEILING = 2 * GB
"""Every token reads all weights once. At the 20 GB/s of an ordinary two-channel memory this is ten
tokens a second, about reading speed; a larger model fits many CPUs but nobody wants to wait for it."""

GRAPH_PRECISIONS = tuple(key for key, precision in PRECISIONS.items() if "onnx" in precision.backends)
"""What a graph for CPUs is written in."""

GRAPH_PARAMETERS = 50_000_000
"""From so many on "auto" may choose ONNX Runtime. The first load writes the graph, which takes longer than a small model,
fast as it is, would ever save."""

DEFAULT_GOAL = Goal()


def plan(
    spec: ModelSpec | None,
    hardware: Hardware,
    budget: MemoryBudget,
    goal: Goal = DEFAULT_GOAL,
    choices: Sequence[ModelSpec] | None = None,
) -> Plan:
    """The best plan for `spec`; when `spec` is None, for the best of `choices` (default: the catalog).

    Always returns a plan: when nothing fits it is the smallest, and its `verdict` is "over".

    Args:
        choices: models to choose from, best first.

    Raises:
        BadInput: a goal outside any sense (context of zero, unknown precision or device).
        Unsupported: a quantized checkpoint that cannot be run, or not in the precision asked for.
    """
    _check(goal, hardware, spec)
    if spec is not None:
        return _plan_model(spec, hardware, budget, goal)
    return _recommend(_catalog() if choices is None else choices, hardware, budget, goal)


def _check(goal: Goal, hardware: Hardware, spec: ModelSpec | None) -> None:
    if not 1 <= goal.context <= 10_000_000:
        raise BadInput(f"A context of {goal.context:,} tokens is not possible.", "Use a value from 1 to 10,000,000.")
    if not 1 <= goal.batch <= 4096:
        raise BadInput(f"A batch of {goal.batch:,} is not possible.", "Use a value from 1 to 4,096.")
    if not 1 <= goal.prefill_chunk <= 1_000_000:
        raise BadInput(f"A prefill chunk of {goal.prefill_chunk:,} is not possible.", "Use a value from 16 to 8,192.")
    if goal.kv not in KV_STORAGES:
        raise BadInput(f"There is no KV cache storage {goal.kv!r}.", f"Choose one of {', '.join(KV_STORAGES)}.")
    keys = ["auto", hardware.cpu.key, *(gpu.key for gpu in hardware.gpus)]
    if goal.device not in keys:
        raise BadInput(f"There is no device {goal.device!r}.", f"Choose one of {', '.join(keys)}.")
    if spec is not None and (unknown := storage_refusal(spec)):
        raise Unsupported(unknown, "Choose the original model; lowmem quantizes while loading.")
    if goal.backend != "auto" and goal.backend not in BACKENDS:
        raise BadInput(f"There is no backend {goal.backend!r}.", f"Choose auto, {' or '.join(BACKENDS)}.")
    if spec is not None and spec.exported and (wrong := _exported_refusal(spec, hardware, goal)):
        raise Unsupported(wrong, "Leave backend, device and precision to the planner, or choose the original model.")
    if goal.backend == "onnx" and spec is not None and (refusal := _graph_refusal(spec, hardware, goal)):
        raise Unsupported(refusal, "Choose the torch backend, or auto.")
    if goal.precision != "auto" and (refusal := available(goal.precision, hardware, goal.device, spec)):
        kind = Unsupported if spec is not None and spec.quantization else BadInput
        raise kind(refusal, "Choose another precision, or auto.")


def _catalog() -> list[ModelSpec]:
    from lowmem.models.catalog import CATALOG

    entries = sorted((e for e in CATALOG if e.chat and not e.gated), key=lambda e: -e.quality)
    return [entry.spec() for entry in entries]


def _graph_refusal(spec: ModelSpec, hardware: Hardware, goal: Goal) -> str | None:
    """Why ONNX Runtime cannot serve this goal, or None."""
    if device_of(hardware, goal.device).kind != "cpu":
        return "The ONNX backend computes on the CPU."
    if goal.kv != "same":
        return f"The ONNX backend keeps its KV cache in fp32, not in {goal.kv}."
    if goal.precision not in ("auto", "stored", *GRAPH_PRECISIONS):
        return f"An ONNX graph is made in {', '.join(GRAPH_PRECISIONS)}, not in {goal.precision}."
    return exported.refusal(spec)


def _exported_refusal(spec: ModelSpec, hardware: Hardware, goal: Goal) -> str | None:
    if goal.backend == "torch" or goal.precision not in ("auto", spec.exported):
        return f"{spec.name} is an exported graph: it runs in {spec.exported} on ONNX Runtime and in no other way."
    return _graph_refusal(spec, hardware, replace(goal, precision="auto"))


def _unasked_refusal(spec: ModelSpec, hardware: Hardware, budget: MemoryBudget) -> str | None:
    """Why nobody who did not ask for a graph gets one: its writing, beside this process, must keep the budget too."""
    if spec.exported:
        return None
    if spec.parameters < GRAPH_PARAMETERS:
        return "It is small enough for torch."
    precision = "stored" if spec.quantization else "int8"
    needed = 2 * hardware.runtime_bytes + exported.writing_bytes(spec, precision)
    return f"Writing its graph takes {format_bytes(needed)}." if needed > budget.limit("ram") else None


def _choices(spec: ModelSpec, hardware: Hardware, budget: MemoryBudget, goal: Goal) -> list[tuple[str, str]]:
    """(precision, backend) worth choosing automatically, best first: on CPUs a graph decodes several times as fast."""
    on_torch = [(precision, "torch") for precision in candidates(hardware, device_of(hardware, goal.device), spec)]
    if spec.exported:
        return [(spec.exported, "onnx")]
    unasked = goal.backend == "auto" and _unasked_refusal(spec, hardware, budget)
    if goal.backend == "torch" or unasked or _graph_refusal(spec, hardware, goal):
        return on_torch
    graphs = ["stored"] if spec.quantization else ["int8"] if goal.backend == "auto" else ["int8", "int4"]
    on_onnx = [(precision, "onnx") for precision in graphs]
    return on_onnx if goal.backend == "onnx" else on_onnx + on_torch


def _draft(
    spec: ModelSpec, hardware: Hardware, budget: MemoryBudget, goal: Goal, precision: str, backend: str = "torch"
) -> Plan:
    device = device_of(hardware, goal.device)
    draft = Plan(
        spec=spec,
        hardware=hardware,
        budget=budget,
        precision=precision,
        device=device.key,
        context=min(goal.context, spec.context),
        batch=goal.batch,
        kv=goal.kv,
        prefill_chunk=goal.prefill_chunk,
        backend=backend,
        or_torch=backend == "onnx"
        and goal.backend == "auto"
        and "torch" in PRECISIONS[precision].backends
        and not spec.exported,
    )
    return reestimate(draft)


def _plan_model(spec: ModelSpec, hardware: Hardware, budget: MemoryBudget, goal: Goal) -> Plan:
    """The first precision that fits; the smallest one when none does."""
    if goal.precision != "auto":
        # A precision by name means what it always meant: graphs have to be asked for, but for the one only they have.
        backend = (
            "onnx"
            if goal.backend == "onnx" or "torch" not in PRECISIONS[goal.precision].backends or spec.exported
            else "torch"
        )
        chosen = _draft(spec, hardware, budget, goal, goal.precision, backend)
        caution = exported.caution(spec, chosen.precision)
        return replace(chosen, reason=f"Precision as asked for. {caution}" if caution else "Precision as asked for.")
    drafts = [_draft(spec, hardware, budget, goal, *choice) for choice in _choices(spec, hardware, budget, goal)]
    fitting = [draft for draft in drafts if draft.verdict != "over"]
    if not fitting:
        chosen = min(drafts, key=lambda d: d.main.peak)
        return replace(chosen, reason="Nothing fits; this takes the least memory.", declined=_declined(drafts, chosen))
    chosen = fitting[0]
    return replace(chosen, reason=_precision_reason(chosen), declined=_declined(drafts, chosen))


def _declined(drafts: Iterable[Plan], chosen: Plan) -> tuple[Declined, ...]:
    return tuple(Declined(_title(d), _why_not(d, chosen)) for d in drafts if d is not chosen)


def _why_not(draft: Plan, chosen: Plan) -> str:
    if draft.verdict == "over":
        return draft.sentence()
    if chosen.backend == "onnx" and draft.backend == "torch" and draft.precision in (chosen.precision, "int8"):
        return f"Fits in {format_bytes(draft.main.peak)}, but torch decodes several times slower than ONNX Runtime."
    if draft.place.kind == "cpu" and chosen.precision == "int8":
        return f"Fits in {format_bytes(draft.main.peak)}, but reads more memory for every token, so it is slower."
    return f"Fits in {format_bytes(draft.main.peak)}, but keeps fewer bits than there is room for."


def _title(plan: Plan) -> str:
    return f"{plan.spec.name}, {plan.precision_label}{', ONNX Runtime' if plan.backend == 'onnx' else ''}"


def _precision_reason(plan: Plan) -> str:
    if plan.backend == "onnx":
        size, seconds = exported.disk_bytes(plan.spec, plan.precision), exported.writing_seconds(plan.spec)
        about = f"{max(10, round(seconds, -1)):.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        once = f"is written once, in about {about}, and kept"
        graph = "it is exported already" if plan.spec.exported else f"its graph ({format_bytes(size)}) {once}"
        if caution := exported.caution(plan.spec, plan.precision):
            return f"int4 on ONNX Runtime takes the least memory; {graph}. {caution}"
        how = "int8 on ONNX Runtime" if plan.precision == "int8" else f"ONNX Runtime ({plan.precision_label})"
        return f"{how} is the fastest on a CPU, at a small loss of precision; {graph}."
    if plan.place.kind == "cpu" and plan.precision == "int8":
        return "int8 is the fastest on a CPU, at a small loss of precision."
    if plan.precision in ("fp16", "bf16", "fp32"):
        return f"{plan.precision} is the most exact that {plan.place.name} runs well, and it fits."
    if plan.precision == "stored":
        return f"The checkpoint is quantized ({plan.precision_label}) and runs as it is stored."
    return f"{plan.precision_label} keeps as many bits as fit."


def _recommend(choices: Sequence[ModelSpec], hardware: Hardware, budget: MemoryBudget, goal: Goal) -> Plan:
    """The best model that fits with room to spare, and then as much context as stays comfortable."""
    if not choices:
        raise BadInput("There is no model to choose from.", "Name one: a hub id, a folder or a .gguf file.")
    declined: list[Declined] = []
    for spec in choices:
        draft = _plan_model(spec, hardware, budget, goal)
        refusal = _too_slow(draft) or ("" if draft.verdict == "fits" else draft.sentence())
        if not refusal:
            return _with_context(draft, goal, tuple(declined))
        declined.append(Declined(_title(draft), refusal))
    drafts = [_plan_model(spec, hardware, budget, goal) for spec in choices]
    least = min(drafts, key=lambda d: d.main.peak)
    smallest = descend(replace(least, reason=""))
    # "Nothing fits" was said of it as it was before.
    reasons = (smallest.reason,) if smallest.verdict != least.verdict == "over" else (least.reason, smallest.reason)
    kept = tuple(d for d in declined if d.choice != _title(smallest))
    return replace(smallest, reason=f"The smallest model there is. {' '.join(filter(None, reasons))}", declined=kept)


def _too_slow(plan: Plan) -> str:
    if plan.place.kind != "cpu":
        return ""
    weights = (
        exported.graph_bytes(plan.spec, plan.precision)
        if plan.backend == "onnx"
        else weight_bytes(plan.spec, plan.precision, plan.place.dtypes[0])
    )
    if weights <= CPU_WEIGHTS_CEILING:
        return ""
    return f"Too slow on a CPU, which would read {format_bytes(weights)} of weights for every token."


def _with_context(draft: Plan, goal: Goal, declined: tuple[Declined, ...]) -> Plan:
    grown = draft
    while grown.context * 2 <= min(draft.spec.context, COMFORTABLE_CONTEXT):
        longer = reestimate(grown, context=grown.context * 2)
        if longer.verdict != "fits":
            break
        grown = longer
    memory = "GPU memory" if grown.main.memory == "vram" else "RAM"
    reason = (
        f"The best model that fits {format_bytes(grown.main.limit)} of {memory} with {goal.context:,} tokens and room to spare. "
        f"{draft.reason} Context {grown.context:,} tokens."
    )
    return replace(grown, reason=reason, declined=(*declined, *draft.declined))
