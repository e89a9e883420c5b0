"""Quantization methods, and the pipeline that quantizes a checkpoint block by block.

A method is a module of `methods` with an object `METHOD`, see `base.Method`. To add one, write the module and add its
name to `METHODS`: labels, forms, flags, sweeps, estimates and saving all read the object. Imports no torch.
"""

from __future__ import annotations

import importlib

from lowmem.errors import BadInput
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.quant.base import Method

METHODS: tuple[str, ...] = ("int8_dynamic", "bnb", "rtn", "hqq", "gptq", "awq")
"""Module names, in the order in which the page lists them."""

DEFAULT = "gptq"
"""The method to use when none is named."""


def get(name: str) -> Method:
    """The method called `name`.

    Raises:
        BadInput: there is no such method; the hint lists them all.
    """
    if name not in METHODS:
        raise BadInput(
            msg("There is no quantization method {name!r}.", name=name),
            msg("Choose one of {methods}.", methods=", ".join(METHODS)),
        )
    method: Method = importlib.import_module(f"{__name__}.methods.{name}").METHOD
    return method


def all_methods() -> tuple[Method, ...]:
    """Every method, in the order of `METHODS`."""
    return tuple(map(get, METHODS))


def usable(hardware: Hardware) -> dict[str, str | None]:
    """Every method by name, with the reason why it cannot run on this machine, or None if it can."""
    return {method.name: method.available(hardware) for method in all_methods()}
