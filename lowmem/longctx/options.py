"""Options of the long-text actions; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.errors import BadInput, NotAllowed
from lowmem.fields import option
from lowmem.messages import msg
from lowmem.units import format_bytes


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


@dataclass(frozen=True, slots=True)
class ReadingLimit:
    """The size of what an action may do with a text: so work of strangers ends.

    Args:
        tokens: that pass through the model, overlaps of windows included.
        file_bytes: of the file that is written.
    """

    tokens: int
    file_bytes: int

    def check_tokens(self, tokens: int) -> None:
        """
        Raises:
            NotAllowed: too many.
        """
        if tokens > self.tokens:
            raise NotAllowed(
                msg(
                    "The model would read {tokens:,} tokens, overlaps of windows included: more than the {most:,} that visitors may request.",
                    tokens=tokens,
                    most=self.tokens,
                ),
                msg("Use a shorter text, or a larger stride."),
            )

    def check_file(self, nbytes: int) -> None:
        """
        Raises:
            NotAllowed: too large.
        """
        if nbytes > self.file_bytes:
            raise NotAllowed(
                msg(
                    "The file would take {size}, more than the {most} that visitors may request.",
                    size=format_bytes(nbytes),
                    most=format_bytes(self.file_bytes),
                ),
                msg("Use a shorter text or fewer layers."),
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
