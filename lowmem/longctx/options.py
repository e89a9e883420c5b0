"""Options of the long-text actions; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import BadInput
from lowmem.fields import option
from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class StrategyOptions:
    """Options of the comparison of cache strategies."""

    tokens: int = option(
        4096, msg("Tokens of text"), msg("More tokens show more and take longer."), low=64, high=200_000, step=256
    )
    window: int = option(
        512, msg("Window"), msg("Tokens that the windowed strategies cache."), low=8, high=100_000, step=64
    )
    sinks: int = option(
        4, msg("Sinks"), msg("First tokens that stay cached in addition to the window."), low=1, high=256, step=1
    )
    kv_bits: str = option("4", msg("KV bits"), msg("Bits of the quantized cache."), choices=("8", "4", "2"))
    points: int = option(
        8, msg("Points"), msg("Positions in the text where time and memory are measured."), low=1, high=100
    )


def parse_layers(text: str) -> list[int]:
    """A list of layers such as "0,6,-1".

    Raises:
        BadInput: anything but numbers separated by commas.
    """
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise BadInput(
            msg("{layers!r} is not a list of layers.", layers=text[:40]), msg("Write it like 0,6,-1.")
        ) from None
