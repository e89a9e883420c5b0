"""What a quantization method is: its options, where it runs, and the one function that chooses codes.

A method sees the weights of layers that share an input, and what is known of that input. It knows nothing of
files, models or layouts. Imports no torch, so that forms and command lines can be built without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.fields import option
from lowmem.machine.hardware import Hardware
from lowmem.models.quantization import BNB, INT8

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem.quant.moments import Moments

__all__ = ["BITS", "BNB", "INT8", "Options", "Quantizer"]

BITS = (2, 3, 4, 8)
SMALLEST_GROUP = 16


@dataclass(frozen=True, slots=True)
class Options:
    """Options that every method has; a method's own class adds to them."""

    bits: int = option(
        4, "Bits", "Width of a stored weight: 2, 3, 4 or 8. Two bits are an experiment.", low=2, high=8, step=1
    )
    group_size: int = option(
        64,
        "Group size",
        "Weights that share a scale: smaller is more exact and takes more space; -1 is a whole row.",
        low=-1,
        high=4096,
        step=1,
    )
    symmetric: bool = option(False, "Symmetric", "No zero point: a little less exact, and understood by more programs.")

    @property
    def layout(self) -> str:
        """How the result is stored: "gptq" (v1), "gptq_v2", "awq", `INT8` or `BNB`."""
        return "gptq" if self.symmetric else "gptq_v2"

    @property
    def balances(self) -> bool:
        """Are input channels scaled against each other first (see `balance.py`)?"""
        return False

    def check(self) -> None:
        """Raise `BadInput` for values that the fields' ranges let through and no layout can store."""
        if self.bits not in BITS:
            raise BadInput(f"{self.bits} bits cannot be stored.", f"Use {', '.join(map(str, BITS))}.")
        if self.group_size != -1 and self.group_size < SMALLEST_GROUP:
            raise BadInput(
                f"A group of {self.group_size} weights would cost more than it saves.",
                f"Use {SMALLEST_GROUP} or more, or -1 for a whole row.",
            )


class Quantizer(Protocol):
    """One method, the object `METHOD` of the module that is named after it.

    `quantize` is called by `pipeline.py` for the layers of each block that share an input, `available` by
    `usable`, the rest by forms and command lines.
    """

    name: str
    label: str
    calibrated: bool
    """Does it need to see a text run through the model?"""
    matrices: int
    """fp32 matrices [in, in] that it holds while it works on layers with that many inputs."""
    Options: Any
    """Its subclass of `Options`."""

    def available(self, hardware: Hardware) -> str | None:
        """Why it cannot run on this machine, in a sentence; None when it can."""
        ...

    def quantize(
        self, weights: Sequence[Tensor], moments: Moments | None, options: Any, cancel: CancelToken
    ) -> list[Any]:
        """A `Quantized`, or a `Packed` of a method that has its own layout, for every weight [out, in] (any float dtype) of layers that share an input.

        `moments` is what is known of that input, None for methods that are not calibrated; those that are give `Quantized`.

        Raises:
            Cancelled: within a second of Stop.
        """
        ...
