"""The precisions a model can be loaded in, one module each. To add one, write its module and add its name to `NAMES`."""

from __future__ import annotations

from importlib import import_module

from lowmem.precisions.base import Precision

NAMES = ("fp32", "fp16", "bf16", "int8", "int4", "bnb8", "nf4", "stored")
"""Module names, in the order in which the page lists them."""

PRECISIONS: dict[str, Precision] = {}
"""By key, in the order of `NAMES`."""

for _name in NAMES:
    _precision: Precision = import_module(f"{__name__}.{_name}").PRECISION
    PRECISIONS[_precision.key] = _precision
