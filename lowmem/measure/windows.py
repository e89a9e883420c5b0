"""Splits a tokenized text into overlapping windows that score every token once. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.datasets.texts import CHARACTERS_PER_TOKEN
from lowmem.errors import BadInput
from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `end` (exclusive); those from `first` on are scored, with the window's earlier tokens as context."""

    start: int
    end: int
    first: int


def cut(length: int, size: int, stride: int, first: int = 0) -> Iterator[Window]:
    """Windows of `size` tokens, `stride` apart; every token from `first` on is scored in the first one that contains it.

    All tokens but those of the first window therefore have at least `size - stride` tokens of context.
    """
    start = 0
    while first < length:
        end = min(start + size, length)
        yield Window(start, end, first)
        start, first = start + stride, end


def tokens_read(windows: Iterable[Window]) -> int:
    """Tokens that pass through the model, overlaps included."""
    return sum(window.end - window.start for window in windows)


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids and the windows in which a model reads them.

    This is the strided method of transformers' documentation ("Perplexity of fixed-length models"), except that the
    mean is weighted exactly by token.

    Args:
        ids: the text's token ids, without special tokens.
        window: tokens per window, including `prefix`.
        stride: tokens between the starts of two windows, less than `window`.
        prefix: special tokens that start every window, as in training; with them the text's first token is scored too.

    Raises:
        BadInput: nothing to score, or a stride or window that leaves tokens without context.
    """

    ids: tuple[int, ...]
    window: int
    stride: int
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.window:
            raise BadInput(
                msg(
                    "A stride of {stride:,} does not work with windows of {window:,} tokens.",
                    stride=self.stride,
                    window=self.window,
                ),
                msg("Use a stride from 1 to {difference:,}.", difference=max(1, self.window - 1)),
            )
        if len(self.prefix) >= self.window:
            raise BadInput(
                msg("A window of {window:,} tokens has no room for text.", window=self.window),
                msg("Use a larger window."),
            )
        if self.scored < 1:
            raise BadInput(
                msg("The text has {ids:,} tokens, too few to measure.", ids=len(self.ids)), msg("Use a longer text.")
            )

    @property
    def scored(self) -> int:
        """Number of tokens that are scored."""
        return len(self.ids) - (0 if self.prefix else 1)

    def windows(self) -> Iterator[Window]:
        return cut(len(self.ids), self.window - len(self.prefix), self.stride, 0 if self.prefix else 1)

    @property
    def identity(self) -> str:
        """Hash of tokens and windows; if equal, the scores of two models correspond row by row."""
        content = json.dumps([self.ids, self.window, self.stride, self.prefix])
        return hashlib.sha256(content.encode()).hexdigest()


def passage(tokenizer: Any, text: str, *, tokens: int, window: int, stride: int) -> Passage:
    """The first `tokens` tokens of `text`, in windows that start with the tokenizer's special tokens."""
    text = text[: CHARACTERS_PER_TOKEN * tokens]
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    return Passage(ids, window, stride, text_prefix(tokenizer))


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    """The beginning-of-sequence token if the tokenizer puts it in front of every text, else nothing."""
    first: Sequence[int] = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
