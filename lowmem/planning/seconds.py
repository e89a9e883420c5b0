"""Estimated seconds of loading, reading and writing, at the speeds that this machine showed in earlier runs.

Reading many tokens at once takes as long as its multiplications, writing them one by one as long as reading all weights
for each, and loading as long as converting them. Small matrices multiply more slowly than large ones, so a speed counts
for models of one width, in one precision, backend and device. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec

from lowmem.events import Receipt
from lowmem.machine.rates import Unmeasured, known_rate, learn_rate
from lowmem.models.spec import ModelSpec
from lowmem.planning.plan import Plan

P = ParamSpec("P")

SHORTEST = 0.05
"""Seconds; what passes faster teaches nothing."""

Work = Literal["loading", "reading", "scoring", "writing", "verifying"]
"""Scoring is reading with logits for every token."""


def or_zero(seconds: Callable[P, float], *arguments: P.args, **named: P.kwargs) -> float:
    """`seconds(...)`, or 0 where that is unmeasured, as in receipts."""
    try:
        return seconds(*arguments, **named)
    except Unmeasured:
        return 0.0


def reading_seconds(plan: Plan, tokens: int, window: int, work: Work = "reading") -> float:
    """Seconds of forward passes over `tokens` tokens together, in windows of `window`.

    Raises:
        Unmeasured: no such model has read so far.
    """
    return _operations(plan.spec, tokens, window, work) / _speed(work, plan)


def writing_seconds(plan: Plan, tokens: int) -> float:
    """Seconds of generating `tokens` tokens one by one; raises `Unmeasured`."""
    return tokens * _weight_bytes(plan) / _speed("writing", plan)


def answer_seconds(plan: Plan, receipt: Receipt) -> float:
    """Seconds of an answer with the lengths of `receipt`, at the speeds of earlier ones; raises `Unmeasured`.

    How long an answer gets is known only afterwards, so the time is predicted for that length.
    """
    if len(receipt.details["finish"]) != 1:
        raise Unmeasured("writing")  # several sequences take turns in ways that no speed tells
    prompt = reading_seconds(plan, receipt.prompt_tokens, receipt.prompt_tokens)
    return prompt + writing_seconds(plan, receipt.new_tokens - 1)  # the first is part of reading


def seconds_by_size(plan: Plan, work: Work) -> float:
    """Seconds of loading a model that is on this machine, its libraries included, or of verifying it; raises `Unmeasured`."""
    return _weight_bytes(plan) / _speed(work, plan)


def learn_reading(plan: Plan, tokens: int, window: int, work: Work, seconds: float) -> None:
    """Note that `reading_seconds` with these arguments were `seconds`."""
    _learn(work, plan, _operations(plan.spec, tokens, window, work), seconds)


def learn_speeds(plan: Plan, receipt: Receipt) -> None:
    """Note the speeds of an answer of one sequence."""
    if receipt.prefill_tps:
        seconds = receipt.prompt_tokens / receipt.prefill_tps
        learn_reading(plan, receipt.prompt_tokens, receipt.prompt_tokens, "reading", seconds)
    if receipt.decode_tps and len(receipt.details["finish"]) == 1:
        tokens = receipt.new_tokens - 1
        _learn("writing", plan, tokens * _weight_bytes(plan), tokens / receipt.decode_tps)


def learn_by_size(plan: Plan, work: Work, seconds: float) -> None:
    """Note that `seconds_by_size` were `seconds`."""
    _learn(work, plan, _weight_bytes(plan), seconds)


def _speed(work: Work, plan: Plan) -> float:
    if plan.placement is not None:
        raise Unmeasured(work)  # depends on where every block is, see `offload.estimate`
    return known_rate(_key(work, plan))


def _learn(work: Work, plan: Plan, amount: float, seconds: float) -> None:
    if plan.placement is None and seconds >= SHORTEST:
        learn_rate(_key(work, plan), amount / seconds)


def _key(work: Work, plan: Plan) -> str:
    spec = plan.spec
    stored = spec.stored.label if plan.precision == "stored" and spec.stored else plan.precision
    return f"{work} of models {spec.hidden} wide in {stored} with {plan.backend} on {plan.place.name}"


def _operations(spec: ModelSpec, tokens: int, window: int, work: Work) -> float:
    """Floating-point operations: two for each weight that a token passes, and those of its attention to half a window."""
    chosen = spec.experts_per_token / max(1, spec.experts)
    head = "embedding" if spec.tied else "head"
    shares = {"linear": 1.0, "experts": chosen} | ({head: 1.0} if work == "scoring" else {})
    packed = sum(rows * columns for rows, columns in spec.packed_layers.values())
    weights = packed + sum(tensor.elements * shares.get(tensor.role, 0.0) for tensor in spec.tensors)
    attention = 2 * sum(
        spec.heads * (cache.key_dim + cache.value_dim) * min(window, cache.window or window) / 2
        for cache in spec.caches
    )
    return tokens * (2 * weights + attention)


def _weight_bytes(plan: Plan) -> int:
    return max(1, plan.main.share("weights"))
