"""What lowmem promises of a set-up, and whether a measurement keeps the promise. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lowmem.events import Receipt
from lowmem.fields import option
from lowmem.machine.budget import MemoryBudget
from lowmem.messages import msg
from lowmem.planning.plan import Plan
from lowmem.units import format_bytes

PASSED, FAILED, MEASURED, SKIPPED = "passed", "failed", "measured", "not measured"

OVERESTIMATE, UNDERESTIMATE = 0.05, 0.02
"""Largest errors of a predicted peak, as shares of the measured one."""

BUDGET_SLACK = 0.02
"""Share of the budget that a measured peak may be above it."""

SPEED_ERROR = 0.25
"""Largest difference between predicted and measured tokens per second, as a share of the measured ones."""

KL_LIMITS = {16: 0.02, 8: 0.05, 4: 0.6}
"""Largest mean KL divergence from the original, in nats per token, by the most bits of a weight that it holds for."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much is measured."""

    tokens: int = option(
        1024, msg("Tokens of text"), msg("Scored by the original and by the set-up."), low=64, high=100_000, step=64
    )
    prompt_tokens: int = option(
        256, msg("Prompt tokens"), msg("Length of the prompt used to measure prefill speed."), low=8, high=8192
    )
    new_tokens: int = option(32, msg("New tokens"), msg("Tokens generated to measure decode speed."), low=2, high=4096)
    runs: int = option(3, msg("Runs"), msg("The speed is the median of this many runs."), low=1, high=100)


@dataclass(frozen=True, slots=True)
class Claim:
    """One promise and its measurement.

    Args:
        key: "load", "answer", "fits", "prefill", "decode", "kl", "parity" or "recall".
        verdict: "passed", "failed", "measured" where lowmem promises no figure, or "not measured".
        sentence: the finding for a person, or why there is none.
        predicted, measured: in `unit`; for "fits" and "kl" `predicted` is the limit. None where there is none.
        unit: "B", "tokens/s", "nats/token" or "".
        memory: of a peak, "ram" or "vram".
    """

    key: str
    verdict: str
    sentence: str
    predicted: float | None = None
    measured: float | None = None
    unit: str = ""
    memory: str = ""

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured."""
        if self.predicted is None or not self.measured:
            return None
        return (self.predicted - self.measured) / self.measured


def skipped(key: str, reason: str) -> Claim:
    return Claim(key, SKIPPED, msg("Not measured: {reason}", reason=reason))


def _verdict(kept: bool) -> str:
    return PASSED if kept else FAILED


def peaks(key: str, receipt: Receipt) -> Iterator[Claim]:
    """The predicted against the measured peak of every memory in an action's receipt; `key` names the action."""
    for memory, predicted in receipt.predicted.items():
        measured = receipt.measured.get(memory)
        if not measured:
            yield skipped(key, msg("this machine does not say how much {memory} was used.", memory=memory.upper()))
            continue
        error = (predicted - measured) / measured
        yield Claim(
            key,
            _verdict(-UNDERESTIMATE <= error <= OVERESTIMATE),
            msg(
                "Peak {memory}: {predicted} predicted, {measured} measured.",
                memory=memory.upper(),
                predicted=format_bytes(predicted),
                measured=format_bytes(measured),
            ),
            predicted,
            measured,
            "B",
            memory,
        )


def fits(claims: Iterable[Claim], budget: MemoryBudget) -> Iterator[Claim]:
    """Whether the highest of the measured peaks kept the budget of its memory."""
    highest: dict[str, float] = {}
    for claim in claims:
        if claim.unit == "B" and claim.measured:
            highest[claim.memory] = max(claim.measured, highest.get(claim.memory, 0))
    for memory, limit in budget.as_dict().items():
        if memory in highest:
            peak = highest[memory]
            yield Claim(
                "fits",
                _verdict(peak <= (1 + BUDGET_SLACK) * limit),
                msg(
                    "{peak} of the {limit} {memory} budget at most.",
                    peak=format_bytes(peak),
                    limit=format_bytes(limit),
                    memory=memory.upper(),
                ),
                limit,
                peak,
                "B",
                memory,
            )


def speed(key: str, measured: float, predicted: float | None) -> Claim:
    """Tokens per second, against the prediction where there is one; `key` is "prefill" or "decode"."""
    if not measured:
        return skipped(key, msg("the model ended its answer with the first token."))
    if predicted is None:
        sentence = msg("{measured:,.1f} tokens/s; none were predicted.", measured=measured)
        return Claim(key, MEASURED, sentence, None, measured, "tokens/s")
    return Claim(
        key,
        _verdict(abs(predicted - measured) <= SPEED_ERROR * measured),
        msg("{predicted:,.1f} tokens/s predicted, {measured:,.1f} measured.", predicted=predicted, measured=measured),
        predicted,
        measured,
        "tokens/s",
    )


def kl_limit(plan: Plan) -> float:
    """The limit of `KL_LIMITS` for the bits of a plan's weights."""
    stored = plan.spec.stored if plan.precision == "stored" else None
    bits = stored.bits if stored else {"fp16": 16, "bf16": 16, "int8": 8, "bnb8": 8}.get(plan.precision, 4)
    return next(limit for most, limit in KL_LIMITS.items() if bits >= most or most == 4)


def divergence(kl: float, agreement: float, tokens: int, limit: float) -> Claim:
    """How far the set-up's next-token distributions are from the original's."""
    return Claim(
        "kl",
        _verdict(kl <= limit),
        msg(
            "Mean KL to the original {kl:.4f} nats per token over {tokens:,} tokens (up to {limit:g}); {agreement:.1%} top-1 match.",
            kl=kl,
            tokens=tokens,
            limit=limit,
            agreement=agreement,
        ),
        limit,
        kl,
        "nats/token",
    )


def recalled(distance: int, probability: float, found: bool) -> Claim:
    """Whether a fact within the context was recalled."""
    sentence = (
        msg("A fact {distance:,} tokens back is recalled (probability {probability:.1%}).", distance=distance, probability=probability)
        if found
        else msg("A fact {distance:,} tokens back is not recalled (probability {probability:.1%}).", distance=distance, probability=probability)
    )  # fmt: skip
    return Claim("recall", _verdict(found), sentence, None, probability)
