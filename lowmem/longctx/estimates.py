"""Memory estimates of the long-text actions, from the resident model's plan; imports no torch."""

from __future__ import annotations

from lowmem.errors import DoesNotFit
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import pass_tokens
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan


def streaming_plan(plan: Plan, options: GenerateOptions, tokens: int) -> Plan:
    """`plan` re-estimated for streaming `tokens` through the KV cache described by `options`."""
    recomputes = bool(options.window) and not options.use_cache
    return reestimate(
        plan,
        context=min(tokens, options.window) if recomputes else tokens,
        batch=1,
        chat=False,
        cache_type=options.cache_type if options.use_cache else "none",
        window=options.window,
        sinks=options.sinks if options.window else 0,
        prefill_chunk=options.window or tokens if not options.use_cache else options.prefill_chunk,
    )


def window_plan(plan: Plan, window: int, tokens: int) -> Plan:
    """`plan` re-estimated for sliding windows over `tokens`; its context is the tokens per pass, several windows if they fit."""
    several = pass_plan(plan, max(window, pass_tokens(plan.place.kind) if tokens > window else 0))
    return several if several.verdict != "over" else pass_plan(plan, window)


def pass_plan(plan: Plan, tokens: int) -> Plan:
    """`plan` re-estimated for forward passes over `tokens` without a KV cache."""
    return reestimate(plan, context=tokens, batch=1, chat=False, cache_type="none", prefill_chunk=tokens)


def refuse_if_over(plan: Plan, force: bool, hint: str) -> None:
    """Check an estimate against its budget.

    Raises:
        DoesNotFit: the plan exceeds its budget, and `force` is off.
    """
    if plan.verdict == "over" and not force:
        raise DoesNotFit(plan.sentence(), hint)
