"""The part of a plan that a user chooses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """What to run; "auto" leaves precision, device or backend to the planner.

    Args:
        context: tokens of prompt and answer.
        batch: sequences at once.
        cache_type: one of `cache.CACHE_TYPES`.
        prefill_chunk: prompt tokens per forward pass.
    """

    context: int = 2048
    batch: int = 1
    precision: str = "auto"
    device: str = "auto"
    cache_type: str = "same"
    prefill_chunk: int = 512
    backend: str = "auto"
