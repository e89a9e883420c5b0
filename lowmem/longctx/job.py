"""The job that measures one cache strategy, in a child process."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from lowmem.events import CancelToken, Step
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.actions import tokens_of, with_beginning
from lowmem.longctx.curve import perplexity
from lowmem.longctx.estimates import refuse_if_over, streaming_plan
from lowmem.longctx.options import StrategyOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.memory_limits import process_bytes
from lowmem.machine.monitor import trim_heap
from lowmem.measure.job import load_exactly
from lowmem.measure.progress import share
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session

LOADED = 20
"""Per cent of the job that loading the model counts for."""

TIMED_TOKENS = 6


def measure_strategy(
    ref: str,
    precision: str,
    text: str,
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
    budget: Mapping[str, int],
) -> Generator[Step, None, dict[str, Any]]:
    """Load a model and stream a text through one cache, up to the end or the model's context.

    Args:
        text: file with the text.
        fields: fields of `GenerateOptions` that describe the cache.
        options: fields of `StrategyOptions`.
        budget: fields of `MemoryBudget`.

    Returns:
        "points" (fields of `Point` without `strategy`), "device" and "precision".

    Raises:
        LowMemError: of planning, loading and reading.
    """
    chosen, cache = build(StrategyOptions, options), build(GenerateOptions, fields)
    session, cancel = Session(), CancelToken()  # never set: Stop kills the process
    spec = read_spec(ref)
    goal = Goal(context=min(chosen.tokens, spec.context), precision=precision, backend="torch")
    plan = session.plan_for(spec, goal, MemoryBudget(**budget))
    yield from share(load_exactly(session, plan), 0, LOADED)
    loaded, resident = session._resident()
    from lowmem.longctx.reading import Reader

    ids = with_beginning(loaded.tokenizer, tokens_of(loaded.tokenizer, Path(text).read_text("utf-8"), chosen.tokens))
    if not cache.window:
        ids = ids[: plan.spec.context]
    action = streaming_plan(resident, cache, len(ids))
    refuse_if_over(action, False, msg("Use fewer tokens or a shorter window."))
    reader, points = Reader(loaded.model, ids, cache), list[dict[str, Any]]()
    for number in range(1, chosen.points + 1):
        until = number * (len(ids) - 1 - TIMED_TOKENS) // chosen.points
        nll, count = 0.0, 0
        for losses in reader.read(until, cancel):
            nll, count = nll + float(losses.sum()), count + len(losses)
            done = LOADED + (100 - LOADED) * reader.at // len(ids)
            yield Step(done, 100, msg("{at:,} of {ids:,} tokens", at=reader.at, ids=len(ids)), "%")
        if not count:
            continue
        trim_heap()
        at, seconds = reader.at, reader.seconds_per_token(TIMED_TOKENS)
        points.append(
            {
                "tokens": at,
                "perplexity": perplexity(nll, count),
                "token_seconds": seconds,
                "kv_bytes": reader.cache_bytes(),
                "ram_bytes": process_bytes(),
            }
        )
    return {"points": points, "device": plan.device, "precision": plan.precision}
