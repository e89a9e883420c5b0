"""Tokenizes long texts in pieces, so that the tokenizer's memory does not grow with the text.

A tokenizer holds about 500 bytes per token of its input, far more than the ids. Pieces overlap, and consecutive pieces are
joined at the beginning of a word after which both have the same tokens. If they disagree, the text is tokenized as a whole.
"""

from __future__ import annotations

from typing import Any

from lowmem.errors import BadInput
from lowmem.messages import msg

PIECE, OVERLAP = 32_768, 512
"""In characters."""

AGREEING = 16
"""Tokens after the join on which two pieces must agree."""


def check_ids(largest: int, vocabulary: int) -> None:
    """Refuse token ids of which the model has no embedding.

    A tokenizer may know more tokens than the model: only those of a text matter.

    Raises:
        BadInput: `largest` is not below the number of tokens in the model's `vocabulary`.
    """
    if largest >= vocabulary:
        raise BadInput(
            msg(
                "The tokenizer produced token {largest:,}, but the model's vocabulary has only {vocabulary:,} tokens.",
                largest=largest,
                vocabulary=vocabulary,
            ),
            msg("The tokenizer belongs to another model: download the model again with its own tokenizer."),
        )


def token_ids(tokenizer: Any, text: str, most: int | None = None) -> list[int]:
    """The first `most` token ids of `text` without special tokens, equal to those of tokenizing it as a whole."""
    if len(text) <= PIECE or not getattr(tokenizer, "is_fast", False):
        return _whole(tokenizer, text)[:most]
    ids: list[int] = []
    start, expected = 0, list[int]()
    while most is None or len(ids) < most:
        begin, end = max(0, start - OVERLAP), min(len(text), start + PIECE)
        new = [(token, place) for token, place in _placed(tokenizer, text, begin, end) if place >= start]
        if [token for token, _ in new[: len(expected)]] != expected:
            return _whole(tokenizer, text)[:most]
        if end == len(text):
            ids += (token for token, _ in new)
            break
        cut = _last_word(text, new, end - OVERLAP)
        if cut is None:
            return _whole(tokenizer, text)[:most]
        ids += (token for token, place in new if place < cut)
        expected = [token for token, place in new if place >= cut][:AGREEING]
        start = cut
    return ids[:most]


def with_special(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` with the special tokens that the tokenizer puts around every text."""
    if len(text) <= PIECE:
        return list(tokenizer(text)["input_ids"])
    around, bare = list(tokenizer("a")["input_ids"]), _whole(tokenizer, "a")
    found = (place for place in range(len(around)) if around[place : place + len(bare)] == bare)
    place = next(found, None)
    if place is None:
        return list(tokenizer(text)["input_ids"])
    return [*around[:place], *token_ids(tokenizer, text), *around[place + len(bare) :]]


def _whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _placed(tokenizer: Any, text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Tokens of text[begin:end], each with the position in `text` where it begins."""
    found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
    return [
        (token, begin + first) for token, (first, _) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _last_word(text: str, placed: list[tuple[int, int]], before: int) -> int | None:
    """Start of the last word, at or before `before`, that follows a space and begins a token."""
    for _, place in reversed(placed):
        if place <= before and place > placed[0][1] and text[place].isalnum() and text[place - 1].isspace():
            return place
    return None
