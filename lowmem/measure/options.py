"""What can be set for a measurement, and the memory it is predicted to take; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.fields import option
from lowmem.generate.options import GenerateOptions
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan
from lowmem.units import MB

LOGITS_BYTES = 16 * MB
"""Logits exist for as many tokens at a time as fit this in fp32, at least for one."""

LOGITS_COPIES = 4
"""Alive together at most: log-probabilities, those of the original, their ratio, and the codes they come from."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How much text quality is measured on, and how often speed is."""

    tokens: int = option(
        4096, "Tokens of text", "More make the figures surer and slower.", low=16, high=1_000_000, step=256
    )
    window: int = option(1024, "Window", "Tokens per forward pass.", low=2, high=131_072, step=128)
    stride: int = option(
        512, "Stride", "Tokens the window moves on: smaller gives each token more context and takes longer.",
        low=1, high=131_071, step=128,
    )  # fmt: skip
    prompt_tokens: int = option(
        256, "Prompt tokens", "Length of the prompt that prefill is timed with.", low=8, high=8192
    )
    new_tokens: int = option(32, "New tokens", "Tokens that decoding is timed with.", low=2, high=4096)
    runs: int = option(3, "Runs", "Speed is the median of so many.", low=1, high=100)


def predicted_bytes(plan: Plan, options: MeasureOptions) -> dict[str, int]:
    """Peak bytes by memory ("ram", "vram") of measuring `plan`: of a pass over one window, or of the timed runs."""
    window = min(options.window, plan.spec.context)
    scoring = reestimate(plan, context=window, batch=1, cache_type="none", prefill_chunk=window)
    talking = reestimate(
        plan,
        context=min(options.prompt_tokens + options.new_tokens, plan.spec.context),
        batch=1,
        cache_type="same",
        prefill_chunk=GenerateOptions().prefill_chunk,
    )
    peaks = {memory: max(count, talking.predicted[memory]) for memory, count in scoring.predicted.items()}
    memory = scoring.main.memory
    segment_bytes = min(LOGITS_BYTES, 4 * window * plan.spec.vocab)
    peaks[memory] = max(talking.main.peak, scoring.main.peak + LOGITS_COPIES * segment_bytes)
    return peaks
