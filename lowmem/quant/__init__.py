"""Quantized layers and the methods that make them.

A method is a module of this package with an object `METHOD`, see `base.Quantizer`. To add one, write the module and
put its name in `METHODS`. Imports no torch.
"""

from __future__ import annotations

import importlib

from lowmem.errors import BadInput
from lowmem.machine.hardware import Hardware
from lowmem.quant.base import Quantizer

METHODS = ("int8_dynamic", "bnb", "rtn", "hqq", "gptq", "awq")
"""Module names, in the order in which they are offered."""


def get(name: str) -> Quantizer:
    """The method called `name`; `BadInput` with those that there are."""
    if name not in METHODS:
        raise BadInput(f"There is no quantization method {name!r}.", f"Choose one of {', '.join(METHODS)}.")
    return importlib.import_module(f"{__name__}.methods.{name}").METHOD


def usable(hardware: Hardware) -> dict[str, str | None]:
    """Every method with None, or with the sentence that says why it cannot run on this machine."""
    return {name: get(name).available(hardware) for name in METHODS}
