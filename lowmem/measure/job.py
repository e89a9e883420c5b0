"""The job that measures one variant of a comparison, in a child process: quality, speed and memory."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import DoesNotFit, OutOfMemory
from lowmem.events import CancelToken, Receipt, Step
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.measure.options import MeasureOptions, predicted_bytes
from lowmem.measure.progress import share
from lowmem.messages import msg
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import compute_dtype, weight_bytes
from lowmem.planning.plan import Plan
from lowmem.planning.seconds import learn_reading
from lowmem.runtime.session import Session
from lowmem.units import format_bytes

LOADED, SCORED = 25, 85
"""Per cent of the job done once the model is loaded, and once the text is scored."""


def measure(
    ref: str,
    precision: str,
    text: str,
    reference: str,
    is_reference: bool,
    options: Mapping[str, Any],
    budget: Mapping[str, int],
) -> Generator[Step, None, dict[str, Any]]:
    """Load a model and measure quality, speed and memory.

    Args:
        ref: the model, see `read_spec`.
        precision: one of `PRECISIONS`; "stored" for a quantized checkpoint.
        text: file with the evaluation text.
        reference: file of the original's predictions, to write if `is_reference`, else to compare with if it exists.
        options: fields of `MeasureOptions`.
        budget: fields of `MemoryBudget`.

    Returns:
        Fields of `Row`, and "device", "tokens", "window", "stride".

    Raises:
        LowMemError: planning, loading or measuring failed.
    """
    chosen = build(MeasureOptions, options)
    session = Session()
    goal = Goal(context=chosen.prompt_tokens + chosen.new_tokens, precision=precision)
    plan = session.plan_for(ref, goal, MemoryBudget(**budget))
    predicted = predicted_bytes(plan, chosen)
    _refuse_if_over(plan, predicted)
    yield from share(load_exactly(session, plan), 0, LOADED)
    figures = yield from share(_quality(session, Path(text), Path(reference), is_reference, chosen), LOADED, SCORED)
    speed = yield from share(_speed(session, Path(text), chosen), SCORED, 100)
    return {
        **figures,
        **speed,
        "device": plan.device,
        "weight_bytes": weight_bytes(plan.spec, plan.precision, compute_dtype(plan.precision, plan.place.dtypes)),
        "disk_bytes": plan.spec.size_on_disk,
        "predicted_ram_bytes": predicted["ram"],
        "predicted_vram_bytes": predicted.get("vram"),
    }


def _refuse_if_over(plan: Plan, predicted: dict[str, int]) -> None:
    for estimate in plan.estimates:
        if (peak := predicted[estimate.memory]) > estimate.limit:
            over = format_bytes(peak - estimate.limit)
            raise DoesNotFit(
                msg(
                    "Measuring {model} in {precision} needs {peak} of {memory}, {over} more than the budget of {limit}.",
                    model=plan.spec.name,
                    precision=plan.precision,
                    peak=format_bytes(peak),
                    memory=estimate.memory.upper(),
                    over=over,
                    limit=format_bytes(estimate.limit),
                ),
                msg("Choose fewer bits, a shorter window or a smaller model."),
            )


def load_exactly(session: Session, plan: Plan) -> Generator[Step | Receipt, None, None]:
    """Load `plan`, without the session's fallback to another precision or model.

    Raises:
        OutOfMemory: memory ran out, so the session loaded something else.
    """
    yield from session.load(plan, CancelToken())  # never set: Stop kills the process
    found = session.plan
    if found is None or (found.spec.ref, found.precision) != (plan.spec.ref, plan.precision):
        raise OutOfMemory(
            msg("Memory ran out while loading {model} in {precision}.", model=plan.spec.name, precision=plan.precision),
            msg("Close other programs, or choose fewer bits."),
        )


def _quality(
    session: Session, text: Path, reference: Path, is_reference: bool, options: MeasureOptions
) -> Generator[Step, None, dict[str, Any]]:
    from lowmem.measure.divergence import divergence, write_reference
    from lowmem.measure.perplexity import perplexity
    from lowmem.measure.windows import passage, tokens_read

    loaded, plan = session._resident()
    window, stride = options.window_and_stride(plan.spec.context)
    read = passage(
        loaded.tokenizer,
        text.read_text(encoding="utf-8"),
        tokens=options.tokens,
        window=window,
        stride=stride,
    )
    figures: dict[str, Any] = {"tokens": read.scored, "window": read.window, "stride": read.stride}
    cancel, started = CancelToken(), time.perf_counter()  # never set: Stop kills the process
    if is_reference:
        score = yield from write_reference(loaded.model, read, reference, cancel=cancel)
        figures |= {"kl": 0.0, "agreement": 1.0}
    elif reference.is_file():
        score, compared = yield from divergence(loaded.model, read, reference, cancel=cancel)
        figures |= {"kl": compared.mean, "agreement": compared.agreement}
    else:
        score = yield from perplexity(loaded.model, read, cancel=cancel)
    learn_reading(plan, tokens_read(read.windows()), window, "scoring", time.perf_counter() - started)
    return {**figures, "perplexity": score.value}


def _speed(session: Session, text: Path, options: MeasureOptions) -> Generator[Step, None, dict[str, Any]]:
    from lowmem.measure.speed import measure_speed

    loaded, plan = session._resident()
    length = max(1, min(options.prompt_tokens, plan.spec.context - options.new_tokens))
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")[: 16 * length], add_special_tokens=False)["input_ids"]
    prompt = loaded.tokenizer.decode(ids[:length], skip_special_tokens=False)
    speed = yield from measure_speed(session, prompt, new_tokens=options.new_tokens, runs=options.runs)
    return {"prefill_tps": speed.prefill_tps, "decode_tps": speed.decode_tps or None}
