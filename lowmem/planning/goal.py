"""What a person wants of a run, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Goal:
    """What to run. "auto" leaves precision, device or backend to the planner."""

    context: int = 2048
    batch: int = 1
    precision: str = "auto"
    device: str = "auto"
    kv: str = "same"
    prefill_chunk: int = 512
    backend: str = "auto"
