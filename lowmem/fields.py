"""Options declared once: a frozen dataclass whose field metadata carries label, help and range.

Widgets, validation, command-line flags and documentation all read this metadata.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from lowmem.errors import BadInput

T = TypeVar("T")

log = logging.getLogger("lowmem.fields")


def option(
    default: Any,
    label: str,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    choices: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with what a widget, a flag and a check need to know about it.

    Args:
        aliases: earlier names of the option, which `build` still accepts for one release.
    """
    metadata = {
        "label": label,
        "help": help,
        "low": low,
        "high": high,
        "step": step,
        "choices": choices,
        "aliases": aliases,
    }
    return dataclasses.field(default=default, metadata=metadata)


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """Make `kind` from loose values (a form, an API call, a command line) and check every one.

    Numbers may come as text or as floats; an unknown name, a wrong type or a value outside
    its range raises `BadInput` that names the option, the value and the range.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = _renamed(kind, values)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadInput(f"There is no option {unknown[0]!r}.", f"The options are {', '.join(known)}.")
    return kind(**{name: _checked(known[name], value) for name, value in values.items()})


def aliases(kind: Any) -> dict[str, str]:
    """Earlier names of the options of `kind` -> today's."""
    return {old: field.name for field in dataclasses.fields(kind) for old in field.metadata.get("aliases", ())}


def _renamed(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    today = aliases(kind)
    for old in today.keys() & values.keys():
        log.warning("The option %r is now called %r; the old name will be removed.", old, today[old])
    return {today.get(name, name): value for name, value in values.items()}


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    wanted = type(field.default)
    label = field.metadata["label"]
    try:
        value = _converted(wanted, value)
    except (TypeError, ValueError, OverflowError, KeyError):
        raise BadInput(
            f"{label}: {_short(value)} is not {_NAMES.get(wanted, 'a value')}.", _range_hint(field)
        ) from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = field.metadata["low"], field.metadata["high"]
        too_low, too_high = low is not None and value < low, high is not None and value > high
        if not math.isfinite(value) or too_low or too_high:
            raise BadInput(f"{label} is {_short(value)}.", _range_hint(field))
    if field.metadata["choices"] and value not in field.metadata["choices"]:
        raise BadInput(f"{label}: there is no {_short(value)}.", _range_hint(field))
    return value


_NAMES = {int: "a whole number", float: "a number", bool: "yes or no", str: "text", tuple: "a list of texts"}


def _converted(wanted: type, value: Any) -> Any:
    if wanted is bool:
        if isinstance(value, str):
            return {"true": True, "false": False, "yes": True, "no": False}[value.lower()]
        if not isinstance(value, (bool, int)):
            raise ValueError
        return bool(value)
    if wanted is int:
        if isinstance(value, bool) or float(value) != int(float(value)):
            raise ValueError
        return int(float(value))
    if wanted is float:
        return float(value)
    if wanted is tuple:
        items = [value] if isinstance(value, str) else list(value)
        if not all(isinstance(item, str) for item in items):
            raise ValueError
        return tuple(items)
    if not isinstance(value, str):
        raise ValueError
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _range_hint(field: dataclasses.Field[Any]) -> str:
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices:
        return f"Choose one of {', '.join(choices)}."
    if low is not None and high is not None:
        return f"Use a value from {low:.15g} to {high:.15g}."
    if low is not None:
        return f"Use {low:.15g} or more."
    return f"It must be {_NAMES.get(type(field.default), 'a value')}."
