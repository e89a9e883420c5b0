"""What can be set for reading a long text; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.fields import option


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """Windows over a text that is there already."""

    window: int = option(512, "Window", "Tokens the model sees at once.", low=1, high=1_000_000, step=64)
    stride: int = option(
        256,
        "Stride",
        "Tokens a window moves on: every token has at least window less stride tokens in front of it.",
        low=1,
        high=1_000_000,
        step=64,
    )


@dataclass(frozen=True, slots=True)
class ExerciseOptions:
    """The comparison of ways to read on when memory does not suffice for everything."""

    tokens: int = option(4096, "Tokens of text", "Longer shows more and takes longer.", low=64, high=200_000, step=256)
    window: int = option(512, "Window", "Tokens that the windowed ways remember.", low=8, high=100_000, step=64)
    sinks: int = option(4, "Sinks", "First tokens that are kept beside the window.", low=1, high=256, step=1)
    kv_bits: str = option("4", "KV bits", "Bits of the quantized cache.", choices=("8", "4", "2"))
    points: int = option(8, "Points", "Places along the text where time and memory are measured.", low=1, high=100)
