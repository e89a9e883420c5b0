"""Options declared once: a frozen dataclass whose fields carry label, help, range and choices.

`describe` lists them for widgets, flags and documentation; `build` validates loose values.

pydantic would replace `_converted` and nothing else (about 20 lines): every message still has to be composed here, with
label, value and range, and text for a tuple and bools for a number need validators of their own. Its import and 17
type adapters take 94 ms of CPU time; importing the whole planner takes 64 ms.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from lowmem.errors import BadInput
from lowmem.messages import msg

T = TypeVar("T")

log = logging.getLogger("lowmem.fields")


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option of an options dataclass.

    Args:
        default: its value if none is given; its type is the option's type.
        low, high, step: range and increment of a number, inclusive; None is unbounded.
        choices: allowed values; () allows all.
        aliases: earlier names of the option, which `build` accepts for one release.
        from_model: unset, it is None and takes the model's own value, or `default` where the model has none.
    """

    name: str
    default: Any
    label: str
    help: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    from_model: bool = False


def option(default: Any, label: str, help: str, **details: Any) -> Any:
    """A dataclass field that `describe` finds; `details` are the other fields of `Option`."""
    unset = None if details.get("from_model") else default
    return dataclasses.field(default=unset, metadata={"default": default, "label": label, "help": help, **details})


def describe(kind: Any) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields; fields not declared with `option` are left out."""
    return tuple(Option(f.name, **f.metadata) for f in dataclasses.fields(kind) if f.metadata)


def changed(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults, by name."""
    values = {f.name: (getattr(options, f.name), f.default) for f in dataclasses.fields(options) if f.metadata}
    return {name: value for name, (value, unset) in values.items() if value != unset}


def arguments(values: Mapping[str, Any]) -> str:
    """Keyword arguments as Python writes them: "a=1, b='x'"."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


LONGEST_LITERAL = 20_000
"""Characters of a prompt or text that the Python code of a receipt holds; longer ones are read from a file."""


def literal(value: Any, file: str) -> str:
    """A prompt, prompts or a text as Python code; long ones are read from the JSON `file`, which the person has to save."""
    code = repr(value)
    if len(code) <= LONGEST_LITERAL:
        return code
    return f"__import__('json').load(open({file!r}, encoding='utf-8'))"


def build(kind: type[T], values: Mapping[str, Any]) -> T:
    """`kind` from loose values (a form, an API call, a command line), all of them validated.

    Raises:
        BadInput: an unknown name, a wrong type or a value out of range; the message names option, value and range.
    """
    known = {one.name: one for one in describe(kind)}
    values = _renamed(kind, values)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise BadInput(
            msg("There is no option {unknown!r}.", unknown=unknown[0]),
            msg("The options are {known}.", known=", ".join(known)),
        )
    return kind(**{name: _checked(known[name], value) for name, value in values.items()})


def aliases(kind: Any) -> dict[str, str]:
    """Earlier names of the options of `kind` -> current names."""
    return {old: one.name for one in describe(kind) for old in one.aliases}


def _renamed(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    current = aliases(kind)
    for old in current.keys() & values.keys():
        log.warning("The option %r is now called %r; the old name will be removed.", old, current[old])
    return {current.get(name, name): value for name, value in values.items()}


def _checked(option: Option, value: Any) -> Any:
    if value is None and option.from_model:
        return None
    wanted = type(option.default)
    try:
        value = _converted(wanted, value)
    except (TypeError, ValueError, OverflowError, KeyError):
        raise BadInput(
            msg(
                "{label}: {value} is not {wanted}.",
                label=option.label,
                value=_short(value),
                wanted=_NAMES.get(wanted, msg("a value")),
            ),
            _range_hint(option),
        ) from None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = option.low, option.high
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise BadInput(msg("{label} is {value}.", label=option.label, value=_short(value)), _range_hint(option))
    if option.choices and value not in option.choices:
        raise BadInput(
            msg("{label}: there is no {value}.", label=option.label, value=_short(value)), _range_hint(option)
        )
    return value


_NAMES = {
    int: msg("a whole number"),
    float: msg("a number"),
    bool: msg("yes or no"),
    str: "text",
    tuple: msg("a list of texts"),
}


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


def _range_hint(option: Option) -> str:
    low, high = option.low, option.high
    if option.choices:
        return msg("Choose one of {choices}.", choices=", ".join(option.choices))
    if low is not None and high is not None:
        return msg("Use a value from {low:.15g} to {high:.15g}.", low=low, high=high)
    if low is not None:
        return msg("Use {low:.15g} or more.", low=low)
    return msg("It must be {default}.", default=_NAMES.get(type(option.default), msg("a value")))
