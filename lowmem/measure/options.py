"""Options of a measurement, and its memory estimate. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.fields import option
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.estimate import reestimate
from lowmem.planning.plan import Plan
from lowmem.units import MB

LOGITS_BYTES = 16 * MB
"""Upper limit of the fp32 logits that exist at a time, but at least those of one token."""

LOGITS_COPIES = 4
"""Tensors of the logits' size alive at once: log-probabilities, the reference's, their ratio, and the codes."""

PROCESS_BYTES = 26 * MB
"""What measuring adds to the process: the modules of a session, the tokenizer, the family's code and an empty model.

Measured on one small model."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """Options of measuring quality and speed."""

    tokens: int = option(
        4096,
        msg("Tokens of text"),
        msg("More tokens make the results more precise and take longer."),
        low=16,
        high=1_000_000,
        step=256,
    )
    window: int = option(1024, msg("Window"), msg("Tokens per forward pass."), low=2, high=131_072, step=128)
    stride: int = option(
        512, msg('Stride'), msg('Tokens between the starts of two windows; fewer give each token more context and take longer.'),
        low=1, high=131_071, step=128,
    )  # fmt: skip
    prompt_tokens: int = option(
        256, msg("Prompt tokens"), msg("Length of the prompt used to measure prefill speed."), low=8, high=8192
    )
    new_tokens: int = option(32, msg("New tokens"), msg("Tokens generated to measure decode speed."), low=2, high=4096)
    runs: int = option(3, msg("Runs"), msg("The speed is the median of this many runs."), low=1, high=100)

    def window_and_stride(self, context: int) -> tuple[int, int]:
        """Window and stride for a model of `context` positions, both less where the window is longer than that."""
        if self.window <= context:
            return self.window, self.stride
        return context, min(self.stride, max(1, context // 2))


def predicted_bytes(plan: Plan, options: MeasureOptions) -> dict[str, int]:
    """Estimated peak bytes by memory ("ram", "vram") of measuring `plan`: the larger of scoring and of the timed runs."""
    window, _ = options.window_and_stride(plan.spec.context)
    scoring = reestimate(plan, context=window, batch=1, cache_type="none", prefill_chunk=window)
    generating = reestimate(
        plan,
        context=min(options.prompt_tokens + options.new_tokens, plan.spec.context),
        batch=1,
        cache_type="same",
        prefill_chunk=GenerateOptions().prefill_chunk,
    )
    peaks = {memory: max(count, generating.predicted[memory]) for memory, count in scoring.predicted.items()}
    memory = scoring.main.memory
    segment_bytes = min(LOGITS_BYTES, 4 * window * plan.spec.vocab)
    peaks[memory] = max(generating.main.peak, scoring.main.peak + LOGITS_COPIES * segment_bytes)
    peaks["ram"] += PROCESS_BYTES
    return peaks
