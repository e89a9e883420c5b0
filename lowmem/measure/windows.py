"""A text as tokens, cut into overlapping windows in which every token is scored once; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.datasets.texts import CHARACTERS_PER_TOKEN
from lowmem.errors import BadInput


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `end`, of which those from `first` on are scored, given all before them in the window."""

    start: int
    end: int
    first: int


def cut(length: int, size: int, stride: int, first: int = 0) -> Iterator[Window]:
    """Windows of `size` tokens, `stride` apart, in which every token from `first` on is new in exactly one.

    A token is new in the first window that reaches it, so all but those of the first window have at least
    `size - stride` tokens in front of them, also in the last, shorter window.
    """
    start = 0
    while first < length:
        end = min(start + size, length)
        yield Window(start, end, first)
        start, first = start + stride, end


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids and how a model reads them.

    The strided method of transformers' documentation ("Perplexity of fixed-length models"): every
    token is scored once and, but for the first window, with at least `window - stride` tokens of
    context. There the sum is weighted by tokens exactly.

    Args:
        ids: the text's tokens, without special ones.
        window: tokens the model sees at once, `prefix` included.
        stride: tokens the window moves on, below `window`.
        prefix: special tokens that begin every window, as the model has learnt its texts begin; with
            them the text's first token is scored too.

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
                f"A stride of {self.stride:,} does not work with windows of {self.window:,} tokens.",
                f"Use a stride from 1 to {max(1, self.window - 1):,}.",
            )
        if len(self.prefix) >= self.window:
            raise BadInput(f"A window of {self.window:,} tokens has no room for text.", "Use a larger one.")
        if self.scored < 1:
            raise BadInput(f"The text has {len(self.ids):,} tokens, too few to measure.", "Use a longer text.")

    @property
    def scored(self) -> int:
        """Tokens that get a probability."""
        return len(self.ids) - (0 if self.prefix else 1)

    def windows(self) -> Iterator[Window]:
        return cut(len(self.ids), self.window - len(self.prefix), self.stride, 0 if self.prefix else 1)

    @property
    def identity(self) -> str:
        """Equal where tokens and windows are: figures of two models then compare row by row."""
        content = json.dumps([self.ids, self.window, self.stride, self.prefix])
        return hashlib.sha256(content.encode()).hexdigest()


def passage(tokenizer: Any, text: str, *, tokens: int, window: int, stride: int) -> Passage:
    """The first `tokens` tokens of `text`; windows begin with what the tokenizer puts before every text."""
    text = text[: CHARACTERS_PER_TOKEN * tokens]
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    return Passage(ids, window, stride, text_prefix(tokenizer))


def text_prefix(tokenizer: Any) -> tuple[int, ...]:
    first: Sequence[int] = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()
