"""Reading JSON that others wrote: parsed within limits, and every field held against the type that a reader declares.

A reader is a dataclass whose annotations are the schema: `build(Manifest, values, ...)`. Annotations may be `str`, `bool`, `int`,
`float`, `Any`, `Literal["a", "b"]`, `list[X]`, `tuple[X, Y]` (of a list of that length), `dict[str, X]`, another such dataclass, and
unions of these. Integers have 64 bits and
floating-point numbers are finite: what is larger than that sizes nothing, and cannot even be printed.

Not pydantic: its import takes longer than that of everything that plans, see `lowmem.fields`, and it would be the only thing
that it is used for.
"""

from __future__ import annotations

import functools
import json
import logging
import types
import typing
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite, log10
from typing import Any, TypeVar

from lowmem.errors import CorruptModel
from lowmem.messages import msg

T = TypeVar("T")

log = logging.getLogger("lowmem.models")

MAX_VALUES = 4_000_000
"""Values in a JSON file. The largest tokenizers have 2,000,000; each takes up to 100 bytes once it is parsed."""

LARGEST = 2**63 - 1

MAX_PATTERN, PATTERN_SECONDS = 2000, 0.1
"""Characters of a regular expression, and the time that it has for a name."""

AGAIN = msg("Fetch the model again, or choose another.")


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse `data` as a JSON object; raises `CorruptModel`, which names `what`, when it is not one or has too many values."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise CorruptModel(msg("{what} has more than {count:,} values.", what=what, count=MAX_VALUES), AGAIN)
    try:
        value = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise CorruptModel(msg("{what} is not JSON.", what=what), AGAIN) from None
    if not isinstance(value, dict):
        raise CorruptModel(msg("{what} is not a JSON object.", what=what), AGAIN)
    return value


def build(kind: type[T], values: Mapping[str, Any], what: str, hint: str = AGAIN) -> T:
    """`kind`, a dataclass, from the object in a file; other fields of the file are left out.

    Args:
        what: the file, for messages.

    Raises:
        CorruptModel: a field is missing or has another type.
    """
    try:
        made: T = _object(kind, values)
    except _Mismatch as error:
        name = ".".join(error.path)[:80]
        if error.value is MISSING:
            raise CorruptModel(msg("{what} has no {name}.", what=what, name=name), hint) from None
        value = short(error.value)
        raise CorruptModel(msg("{what} has {name} = {value}.", what=what, name=name, value=value), hint) from None
    return made


def build_leniently(kind: type[T], values: Mapping[str, Any]) -> tuple[T, list[str]]:
    """`kind`, all of whose fields are optional, and the names of the fields that were left out because of their type."""
    found: dict[str, Any] = {}
    wrong = []
    schema: Schema = _schema(kind)  # type: ignore[arg-type]  # a class is hashable
    for name, (read, _) in schema.items():
        try:
            found |= {name: read(values[name])} if name in values else {}
        except _Mismatch:
            wrong.append(name)
    return kind(**found), wrong


class Pattern:
    """A regular expression of a stranger's: one that takes long, as some do on purpose, matches nothing but itself."""

    def __init__(self, text: str) -> None:
        import regex  # which has timeouts; loaded where a model has patterns

        self._text = text
        self._compiled: Any = None
        with suppress(regex.error, OverflowError, RecursionError):
            self._compiled = regex.compile(text) if len(text) <= MAX_PATTERN else None

    def matches(self, text: str) -> bool:
        """Whether the beginning of `text` matches, as with `re.match`."""
        if self._compiled is None:
            return text == self._text
        try:
            return self._compiled.match(text, timeout=PATTERN_SECONDS) is not None
        except TimeoutError:
            log.warning("The pattern %.80r takes too long, and is ignored.", self._text)
            self._compiled = None
            return False


@functools.lru_cache(maxsize=64)
def pattern(text: str) -> Pattern:
    """The pattern, compiled once."""
    return Pattern(text)


def short(value: object) -> str:
    """A value of JSON, short enough to be part of a sentence."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"{'-' if value < 0 else ''}10^{round(value.bit_length() * log10(2))}"
    if isinstance(value, (list, dict)):  # which may hold a number that cannot be printed
        return msg("a list") if isinstance(value, list) else msg("an object")
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


class _Mismatch(ValueError):
    """A value of another type; MISSING for a field that is not there. `path` leads to it."""

    def __init__(self, value: object, path: tuple[str, ...] = ()) -> None:
        self.value, self.path = value, path


Read = Callable[[Any], Any]
"""A value of JSON as the type of an annotation; raises ValueError where it has another."""


@functools.cache
def reader(hint: Any) -> Read:
    """How a value of JSON becomes one of the type that an annotation names."""
    if hint in _SIMPLE:
        return functools.partial(_checked, _SIMPLE[hint])
    if is_dataclass(hint):
        return functools.partial(_object, hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return functools.partial(_checked, lambda value: isinstance(value, str) and value in arguments)
    inner = tuple(map(reader, arguments))
    if origin in (types.UnionType, typing.Union):
        return functools.partial(_first, inner)
    if origin is list:
        return functools.partial(_list, inner[0])
    if origin is tuple:
        return functools.partial(_tuple, inner)
    if origin is dict:
        return functools.partial(_dict, inner[1])
    raise TypeError(f"{hint} is no type of JSON")


Schema = dict[str, tuple[Read, bool]]
"""How each field of a dataclass is read, and whether it must be there."""


@functools.cache
def _schema(kind: Any) -> Schema:
    hints = typing.get_type_hints(kind)
    return {
        field.name: (reader(hints[field.name]), field.default is MISSING and field.default_factory is MISSING)
        for field in fields(kind)
    }


_SIMPLE: dict[Any, Callable[[Any], bool]] = {
    Any: lambda _: True,
    str: lambda value: isinstance(value, str),
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int and -LARGEST <= value <= LARGEST,
    float: lambda value: (type(value) is int and abs(value) <= LARGEST) or (type(value) is float and isfinite(value)),
    types.NoneType: lambda value: value is None,
}


def _checked(right: Callable[[Any], bool], value: Any) -> Any:
    if not right(value):
        raise _Mismatch(value)
    return value


def _first(inner: tuple[Read, ...], value: Any) -> Any:
    for read in inner:
        with suppress(_Mismatch):
            return read(value)
    raise _Mismatch(value)


def _list(read: Read, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _Mismatch(value)
    return list(map(read, value))


def _tuple(inner: tuple[Read, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) != len(inner):
        raise _Mismatch(value)
    return tuple(read(one) for read, one in zip(inner, value, strict=True))


def _dict(read: Read, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Mismatch(value)
    return {key: read(one) for key, one in value.items()}


def _object(kind: Any, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _Mismatch(value)
    found = {}
    for name, (read, needed) in _schema(kind).items():
        if name in value:
            try:
                found[name] = read(value[name])
            except _Mismatch as error:
                raise _Mismatch(error.value, (name, *error.path)) from None
        elif needed:
            raise _Mismatch(MISSING, (name,))
    return kind(**found)
