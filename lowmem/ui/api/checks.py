"""Type and range of the arguments of named endpoints: gradio passes on whatever JSON a caller sends."""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, get_args

from lowmem.errors import BadInput
from lowmem.generate.options import LARGEST_BATCH
from lowmem.messages import msg

RANGES = {
    "batch_size": (0, LARGEST_BATCH),
    "window": (0, 1_000_000),
    "stride": (0, 1_000_000),
    "sinks": (0, 256),
    "workers": (0, 64),
    "new_tokens": (1, 4096),
    "num_return_sequences": (0, 64),
}
"""Numbers that size something: least and most. Those of options are declared with the options."""

ANY_NUMBER = (-(2**31), 2**31 - 1)
MOST_ITEMS, LONGEST_TEXT, LONGEST_NAME = 10_000, 4_000_000, 4_000

TEXTS = frozenset({"text", "prompt", "message", "system"})
"""All other texts are names, addresses and the like."""

ITEMS = {"layers": int, "models": str, "variants": str, "methods": str, "precisions": str}
"""What the entries of lists are; others take anything."""


def checked(name: str, hint: Any, value: Any) -> Any:
    """An argument as its endpoint takes it.

    Args:
        hint: one of bool, int, str, list and dict, or of these with None.

    Raises:
        BadInput: another type, a number out of range, or too long.
    """
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    if kind is int:
        return _number(name, value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if not isinstance(value, kind) or not _sound(value, ITEMS.get(name) if kind is list else None):
        raise BadInput(
            msg("{name} is not {wanted}.", name=name, wanted=_NAMES[kind]),
            msg("Its description is in the list of endpoints."),
        )
    most = (LONGEST_TEXT if name in TEXTS else LONGEST_NAME) if kind is str else MOST_ITEMS
    if kind is not bool and len(value) > most:
        raise BadInput(
            msg(
                "{name} has {count:,} entries or characters, more than {most:,}.",
                name=name,
                count=len(value),
                most=most,
            ),
            msg("Shorten it."),
        )
    return value


def _sound(value: Any, kind: type | None = None) -> bool:
    """Whether all texts of a value can be written as UTF-8 without zeros, and all entries of a list are of `kind`."""
    if isinstance(value, str):
        return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return all(_sound(one) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return all(_sound(one) and (kind is None or type(one) is kind) for one in value)
    return True


_NAMES = {bool: msg("yes or no"), str: msg("a text"), list: msg("a list"), dict: msg("a mapping of names to values")}


def _number(name: str, value: Any) -> int:
    low, high = RANGES.get(name, ANY_NUMBER)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not whole or not low <= value <= high or not math.isclose(value, int(value), abs_tol=1e-9):
        raise BadInput(
            msg("{name} is {value}.", name=name, value=_short(value)),
            msg("Use a whole number from {low:,} to {high:,}.", low=low, high=high),
        )
    return int(value)


def _short(value: Any) -> str:
    """For a sentence: Python itself refuses to write integers of more than 4,300 digits."""
    large = isinstance(value, int) and value.bit_length() > 64
    return f"10^{value.bit_length() * math.log10(2):.0f}" if large else repr(value)[:40]
