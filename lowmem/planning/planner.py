"""Choose model, precision and context for a machine and a budget, and say why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lowmem.errors import BadInput, Unsupported
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.machine.rates import Unmeasured
from lowmem.messages import Message, join, msg
from lowmem.models.catalog import recommended
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.estimate import reestimate
from lowmem.planning.fallback import fall_back
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.model_bytes import bytes_per_token, compute_dtype
from lowmem.planning.plan import BACKENDS, Declined, Plan
from lowmem.planning.precision import available, candidates, device_of, storage_refusal
from lowmem.precisions import PRECISIONS
from lowmem.units import GB, format_bytes, format_time_range

COMFORTABLE_CONTEXT = 8192
"""The automatic context grows up to this as long as the plan fits comfortably."""

CPU_WEIGHTS_CEILING = 2 * GB
"""Every token reads these once: all weights, of a mixture the chosen experts'. At the 20 GB/s of ordinary dual-channel memory this is ten
tokens per second, about reading speed; a larger model fits many machines but is too slow to use."""

GRAPH_PRECISIONS = tuple(key for key, precision in PRECISIONS.items() if "onnx" in precision.backends)
"""Precisions of a graph for CPUs."""

GRAPH_PARAMETERS = 50_000_000
"""The smallest model for which "auto" may choose ONNX Runtime. The first load writes the graph, which takes longer than a
small model would ever save."""

DEFAULT_GOAL = Goal()


def plan(
    spec: ModelSpec | None,
    hardware: Hardware,
    budget: MemoryBudget,
    goal: Goal = DEFAULT_GOAL,
    choices: Sequence[ModelSpec] | None = None,
    shortage: str = "",
) -> Plan:
    """The best plan for `spec`; if `spec` is None, for the best of `choices` (default: the catalog).

    Always returns a plan: if nothing fits it is the smallest, and its `verdict` is "over".

    Args:
        budget: see `MemoryBudget.bounded`.
        choices: models to choose from, best first.
        shortage: why others are not among them, a sentence for the reason.

    Raises:
        BadInput: an impossible goal, such as a context of 0 or an unknown precision or device.
        Unsupported: a quantized checkpoint that cannot be run, or not in the chosen precision.
    """
    _check(goal, hardware, spec)
    if spec is not None:
        return _plan_model(spec, hardware, budget, goal)
    if choices is None:
        choices = [entry.spec() for entry in recommended()]
    chosen = _recommend(choices, hardware, budget, goal)
    return replace(chosen, reason=join(" ", (shortage, chosen.reason))) if shortage else chosen


def _check(goal: Goal, hardware: Hardware, spec: ModelSpec | None) -> None:
    if not 1 <= goal.context <= 10_000_000:
        raise BadInput(
            msg("A context of {context:,} tokens is not possible.", context=goal.context),
            msg("Use a value from 1 to 10,000,000."),
        )
    if not 1 <= goal.batch <= 4096:
        raise BadInput(
            msg("A batch of {batch:,} is not possible.", batch=goal.batch), msg("Use a value from 1 to 4,096.")
        )
    if not 1 <= goal.prefill_chunk <= 1_000_000:
        raise BadInput(
            msg("A prefill chunk of {prefill_chunk:,} is not possible.", prefill_chunk=goal.prefill_chunk),
            msg("Use a value from 16 to 8,192."),
        )
    if goal.cache_type not in CACHE_TYPES:
        raise BadInput(
            msg("There is no KV cache type {cache_type!r}.", cache_type=goal.cache_type),
            msg("Choose one of {cache_types}.", cache_types=", ".join(CACHE_TYPES)),
        )
    keys = ["auto", hardware.cpu.key, *(gpu.key for gpu in hardware.gpus)]
    if goal.device not in keys:
        raise BadInput(
            msg("There is no device {device!r}.", device=goal.device),
            msg("Choose one of {keys}.", keys=", ".join(keys)),
        )
    if spec is not None and (unknown := storage_refusal(spec)):
        raise Unsupported(unknown, msg("Choose the original model; lowmem quantizes while loading."))
    if goal.backend != "auto" and goal.backend not in BACKENDS:
        raise BadInput(
            msg("There is no backend {backend!r}.", backend=goal.backend),
            msg("Choose auto, {backends}.", backends=" or ".join(BACKENDS)),
        )
    if spec is not None and spec.exported and (wrong := _exported_refusal(spec, hardware, goal)):
        raise Unsupported(
            wrong, msg("Leave backend, device and precision to the planner, or choose the original model.")
        )
    if goal.backend == "onnx" and spec is not None and (refusal := _graph_refusal(spec, hardware, goal)):
        raise Unsupported(refusal, msg("Choose the torch backend, or auto."))
    if goal.precision != "auto" and (refusal := available(goal.precision, hardware, goal.device, spec)):
        kind = Unsupported if spec is not None and spec.quantization else BadInput
        raise kind(refusal, msg("Choose another precision, or auto."))


def _graph_refusal(spec: ModelSpec, hardware: Hardware, goal: Goal) -> str | None:
    """Why ONNX Runtime cannot run this goal, or None."""
    if device_of(hardware, goal.device).kind != "cpu":
        return msg("The ONNX backend runs on the CPU only.")
    if goal.cache_type != "same":
        return msg("The ONNX backend has an fp32 KV cache, not {cache_type}.", cache_type=goal.cache_type)
    if goal.precision not in ("auto", "stored", *GRAPH_PRECISIONS):
        return msg(
            "ONNX graphs are available in {graph_precisions}, not in {precision}.",
            graph_precisions=", ".join(GRAPH_PRECISIONS),
            precision=goal.precision,
        )
    return exported.refusal(spec)


def _exported_refusal(spec: ModelSpec, hardware: Hardware, goal: Goal) -> str | None:
    if goal.backend == "torch" or goal.precision not in ("auto", spec.exported):
        return msg(
            "{model} is an exported graph: it runs only in {exported} on ONNX Runtime.",
            model=spec.name,
            exported=spec.exported,
        )
    return _graph_refusal(spec, hardware, replace(goal, precision="auto"))


def _graph_pays(spec: ModelSpec, hardware: Hardware, budget: MemoryBudget) -> bool:
    """Whether "auto" may choose a graph: the model is large enough, and writing it in a second process fits the budget."""
    if spec.exported:
        return True
    precision = "stored" if spec.quantization else "int8"
    needed = 2 * hardware.runtime_bytes + exported.writing_bytes(spec, precision)
    return spec.parameters >= GRAPH_PARAMETERS and needed <= budget.limit("ram")


def _choices(spec: ModelSpec, hardware: Hardware, budget: MemoryBudget, goal: Goal) -> list[tuple[str, str]]:
    """(precision, backend) that "auto" considers, best first: on CPUs a graph decodes several times faster than torch."""
    on_torch = [(precision, "torch") for precision in candidates(hardware, device_of(hardware, goal.device), spec)]
    if spec.exported:
        return [(spec.exported, "onnx")]
    if goal.backend == "torch" or _graph_refusal(spec, hardware, goal):
        return on_torch
    if goal.backend == "auto" and not _graph_pays(spec, hardware, budget):
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
        cache_type=goal.cache_type,
        prefill_chunk=goal.prefill_chunk,
        chat=spec.has_chat_template,
        backend=backend,
        or_torch=backend == "onnx"
        and goal.backend == "auto"
        and "torch" in PRECISIONS[precision].backends
        and not spec.exported,
    )
    return reestimate(draft)


def _plan_model(
    spec: ModelSpec, hardware: Hardware, budget: MemoryBudget, goal: Goal, *, comfortable: bool = False
) -> Plan:
    """The plan in the first precision that fits, or in the smallest if none does.

    Args:
        comfortable: prefer the first that fits with room to spare.
    """
    if goal.precision != "auto":
        # A named precision runs on torch unless only graphs have it.
        on_torch = "torch" in PRECISIONS[goal.precision].backends and not spec.exported and goal.backend != "onnx"
        backend = "torch" if on_torch else "onnx"
        chosen = _draft(spec, hardware, budget, goal, goal.precision, backend)
        caution = exported.caution(spec, chosen.precision)
        return replace(
            chosen,
            reason=msg("The precision you chose. {caution}", caution=caution)
            if caution
            else msg("The precision you chose."),
        )
    drafts = [_draft(spec, hardware, budget, goal, *choice) for choice in _choices(spec, hardware, budget, goal)]
    fitting = [draft for draft in drafts if draft.verdict != "over"]
    if comfortable:
        fitting = [draft for draft in fitting if draft.verdict == "fits"] or fitting
    if not fitting:
        chosen = min(drafts, key=lambda d: d.main.peak)
        return replace(
            chosen, reason=msg("Nothing fits; this needs the least memory."), declined=_declined(drafts, chosen)
        )
    chosen = fitting[0]
    return replace(chosen, reason=_precision_reason(chosen), declined=_declined(drafts, chosen))


def _declined(drafts: Iterable[Plan], chosen: Plan) -> tuple[Declined, ...]:
    return tuple(Declined(title(d), _why_not(d, chosen)) for d in drafts if d is not chosen)


def _why_not(draft: Plan, chosen: Plan) -> str:
    if draft.verdict == "over" or (draft.verdict != "fits" and chosen.verdict == "fits"):
        return draft.sentence()
    if chosen.backend == "onnx" and draft.backend == "torch" and draft.precision in (chosen.precision, "int8"):
        return msg(
            "Fits in {peak}, but torch decodes several times slower than ONNX Runtime.",
            peak=format_bytes(draft.main.peak),
        )
    if draft.place.kind == "cpu" and chosen.precision == "int8":
        return msg("Fits in {peak}, but is slower: it reads more memory per token.", peak=format_bytes(draft.main.peak))
    return msg("Fits in {peak}, but there is room for more bits.", peak=format_bytes(draft.main.peak))


def title(plan: Plan) -> str:
    """What a plan chooses, among alternatives: "Qwen3-8B, int8 (dynamic, for CPU), ONNX Runtime"."""
    return (
        msg("{model}, {precision_label}, ONNX Runtime", model=plan.spec.name, precision_label=plan.precision_label)
        if plan.backend == "onnx"
        else Message("{model}, {precision_label}", model=plan.spec.name, precision_label=plan.precision_label)
    )


def _precision_reason(plan: Plan) -> str:
    if plan.backend == "onnx":
        graph, caution = _graph_sentence(plan), exported.caution(plan.spec, plan.precision)
        if caution:
            return msg("int4 on ONNX Runtime needs the least memory. {graph} {caution}", graph=graph, caution=caution)
        if plan.precision == "int8":
            return msg("int8 on ONNX Runtime is fastest on a CPU, with a small loss of quality. {graph}", graph=graph)
        return msg(
            "ONNX Runtime ({precision_label}) is fastest on a CPU, with a small loss of quality. {graph}",
            precision_label=plan.precision_label,
            graph=graph,
        )
    if plan.place.kind == "cpu" and plan.precision == "int8":
        return msg("int8 is fastest on a CPU, with a small loss of quality.")
    if plan.precision in ("fp16", "bf16", "fp32"):
        return msg(
            "{precision} is the most accurate precision that {place} runs well, and it fits.",
            precision=plan.precision,
            place=plan.place.name,
        )
    if plan.precision == "stored":
        return msg(
            "The checkpoint is already quantized ({precision_label}) and runs as stored.",
            precision_label=plan.precision_label,
        )
    return msg("{precision_label} has the most bits that fit.", precision_label=plan.precision_label)


def _graph_sentence(plan: Plan) -> str:
    if plan.spec.exported:
        return msg("It is already exported.")
    size = format_bytes(exported.disk_bytes(plan.spec, plan.precision))
    try:
        seconds = exported.writing_seconds(plan.spec, ExportOptions(precision=plan.precision))
    except Unmeasured:
        return msg("Its graph ({size}) is written once.", size=size)
    return msg("Its graph ({size}) is written once, in {range}.", size=size, range=format_time_range(seconds))


def _recommend(choices: Sequence[ModelSpec], hardware: Hardware, budget: MemoryBudget, goal: Goal) -> Plan:
    """The best model that fits with room to spare, with as much context as fits comfortably."""
    if not choices:
        raise BadInput(msg("There is no model to choose from."), msg("Name one: a hub id, a folder or a .gguf file."))
    declined: list[Declined] = []
    for spec in choices:
        draft = _plan_model(spec, hardware, budget, goal, comfortable=True)
        refusal = _too_slow(draft) or ("" if draft.verdict == "fits" else draft.sentence())
        if not refusal:
            return _with_context(draft, goal, tuple(declined))
        declined.append(Declined(title(draft), refusal))
    if goal.device == "auto" and hardware.gpus:
        on_cpu = _recommend(choices, hardware, budget, replace(goal, device=hardware.cpu.key))
        if on_cpu.verdict == "fits":
            return replace(on_cpu, reason=msg("No model fits the GPU. {reason}", reason=on_cpu.reason))
    drafts = [_plan_model(spec, hardware, budget, goal) for spec in choices]
    least = min(drafts, key=lambda d: d.main.peak)
    smallest = fall_back(replace(least, reason=""))
    # "Nothing fits" no longer holds after a fallback.
    reasons = (smallest.reason,) if smallest.verdict != least.verdict == "over" else (least.reason, smallest.reason)
    alternatives = tuple(d for d in declined if d.choice != title(smallest))
    return replace(
        smallest,
        reason=msg("The smallest model available. {reasons}", reasons=" ".join(filter(None, reasons))),
        declined=alternatives,
    )


def _too_slow(plan: Plan) -> str:
    if plan.place.kind != "cpu":
        return ""
    weights = (
        exported.graph_bytes(plan.spec, plan.precision)
        if plan.backend == "onnx"
        else bytes_per_token(plan.spec, plan.precision, compute_dtype(plan.precision, plan.place.dtypes))
    )
    if weights <= CPU_WEIGHTS_CEILING:
        return ""
    return msg("Too slow on a CPU: every token would read {weights} of weights.", weights=format_bytes(weights))


def _with_context(draft: Plan, goal: Goal, declined: tuple[Declined, ...]) -> Plan:
    grown = draft
    while grown.context * 2 <= min(draft.spec.context, COMFORTABLE_CONTEXT):
        longer = reestimate(grown, context=grown.context * 2)
        if longer.verdict != "fits":
            break
        grown = longer
    memory = msg("GPU memory") if grown.main.memory == "vram" else "RAM"
    reason = msg(
        "The best model that fits {limit} of {memory} with {context:,} tokens and room to spare. {reason} Context {chosen:,} tokens.",
        limit=format_bytes(grown.main.limit),
        memory=memory,
        context=goal.context,
        reason=draft.reason,
        chosen=grown.context,
    )
    return replace(grown, reason=reason, declined=(*declined, *draft.declined))
