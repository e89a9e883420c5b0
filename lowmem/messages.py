"""User-facing messages: created in English, translated to the reader's language for display.

The engine, the command line and the endpoints speak English and take a `Message` for the text that it is. The page
knows its visitor's language and translates. Catalogues are gettext's; CONTRIBUTING.md describes how to update them.
"""

from __future__ import annotations

import gettext
import numbers
import string
from collections.abc import Iterable
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

ENGLISH = "en"
LANGUAGE: ContextVar[str] = ContextVar("language", default=ENGLISH)
"""The language of the current request."""

DOMAIN = "lowmem"
LOCALES = Path(__file__).parent / "locale"


class Message(str):
    """The finished English text, which also carries what a translation needs.

    >>> Message("{count:,} of {limit:,} tokens", count=1024, limit=4096)
    '1,024 of 4,096 tokens'

    Args:
        msgid: the text with named placeholders, the key of the catalogues; without `params` it is taken as it is.
        params: what fills them: numbers, texts, messages.
    """

    msgid: str
    params: dict[str, Any]

    def __new__(cls, msgid: str, /, **params: Any) -> Message:
        self = super().__new__(cls, msgid.format(**params) if params else msgid)
        self.msgid, self.params = msgid, {name: _plain(value) for name, value in params.items()}
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (self.msgid,), self.params

    def __str__(self) -> str:
        return self  # what calls str() on a label, as gradio does, keeps the message

    def __add__(self, other: str) -> Message:
        return Message("{first}{second}", first=self, second=other)

    def __radd__(self, other: str) -> Message:
        return Message("{first}{second}", first=other, second=self)


LONGEST_VALUE = 500
"""Characters of a text in a sentence: names and fields of strangers' files may have any length."""


def msg(msgid: str, /, **params: Any) -> str:
    """A `Message` for the catalogues, which hold the first argument of every call; long texts are cut."""
    return Message(msgid, **{name: _within_a_sentence(value) for name, value in params.items()})


def _within_a_sentence(value: Any) -> Any:
    cut = isinstance(value, str) and not isinstance(value, Message) and len(value) > LONGEST_VALUE
    return f"{value[: LONGEST_VALUE - 3]}..." if cut else value


NUMBER = msg("1,234.5")
"""Translated like any other text, it shows how a language writes its numbers."""


def join(separator: str, parts: Iterable[str]) -> Message:
    """`separator.join(parts)`, whose parts can still be translated."""
    named = {f"part{number}": part for number, part in enumerate(parts)}
    return Message(separator.join(f"{{{name}}}" for name in named), **named)


def translate(text: str, language: str | None = None) -> str:
    """A message in `language`, by default that of the current request; any other text as it is."""
    language = language or LANGUAGE.get()
    return _Writer.of(language).write(text) if isinstance(text, Message) and language != ENGLISH else text


class _Writer(string.Formatter):
    """Writes messages in one language, numbers with its signs."""

    def __init__(self, language: str) -> None:
        self._catalogue = gettext.translation(DOMAIN, LOCALES, [_folder(language).name])
        number = self._catalogue.gettext(NUMBER)
        self._signs = str.maketrans({",": number[1], ".": number[-2]})

    @staticmethod
    @cache
    def of(language: str) -> _Writer:
        return _Writer(language)

    def write(self, message: Message) -> str:
        template = self._catalogue.gettext(message.msgid) if message.msgid else ""
        return self.vformat(template, (), message.params) if message.params else template

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Message):
            value = self.write(value)
        text = format(value, format_spec)
        return text.translate(self._signs) if isinstance(value, (int, float)) else text


def _plain(value: Any) -> Any:
    """What JSON and another process can carry."""
    if isinstance(value, (str, int, float)):
        return value
    return float(value) if isinstance(value, numbers.Real) else str(value)


def packed(value: Any) -> Any:
    """`value` for JSON, with messages as objects; `json.loads(text, object_hook=unpacked)` reads it."""
    match value:
        case Message():
            return {"msgid": value.msgid, "params": packed(value.params)}
        case dict():
            return {key: packed(one) for key, one in value.items()}
        case list() | tuple():
            return [packed(one) for one in value]
    return value


def unpacked(value: dict[str, Any]) -> Any:
    return Message(value["msgid"], **value["params"]) if value.keys() == {"msgid", "params"} else value


def languages() -> tuple[str, ...]:
    """Keys of all languages ("en", "pt"), English first."""
    return (ENGLISH, *sorted(folder.name.partition("_")[0] for folder in LOCALES.iterdir()))


def tag(language: str) -> str:
    """A language's name on the web ("pt-BR")."""
    return ENGLISH if language == ENGLISH else _folder(language).name.replace("_", "-")


def _folder(language: str) -> Path:
    return next(folder for folder in LOCALES.iterdir() if folder.name.partition("_")[0] == language)


def preferred(accept: str) -> str:
    """The language of a browser's Accept-Language header, English where none of its wishes is known.

    >>> preferred("de;q=0.5, pt-BR, pt;q=0.9, en;q=0.8")
    'pt'
    """
    wishes = []
    for wish in accept.lower().split(","):
        name, _, weight = wish.strip().partition(";q=")
        wishes.append((-_weight(weight), name.partition("-")[0]))
    known = languages()
    return next(
        (name for weight, name in sorted(wishes, key=lambda wish: wish[0]) if weight and name in known), ENGLISH
    )


def _weight(text: str) -> float:
    try:
        return float(text or 1)
    except ValueError:
        return 0.0
