"""Token ids of texts of any length, in memory that does not grow with them.

A tokenizer holds some 500 bytes for each token of the text at hand, far more than the ids. So a long text goes
through it piece by piece. Pieces overlap, and one is joined to the next where a word begins and where both give
the same tokens; where they do not, the text is tokenized whole.
"""

from __future__ import annotations

from typing import Any

PIECE, OVERLAP = 32_768, 512
"""Characters."""

AGREEING = 16
"""Tokens that two pieces must share before they are taken for the same."""


def token_ids(tokenizer: Any, text: str, most: int | None = None) -> list[int]:
    """The first `most` token ids of `text`, without special ones: those that tokenizing the whole would give."""
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
    """Token ids of `text` between the special tokens that the tokenizer puts around every text."""
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
    """Tokens of text[begin:end], each with the place in `text` where its characters begin."""
    found = tokenizer(text[begin:end], add_special_tokens=False, return_offsets_mapping=True)
    return [
        (token, begin + first) for token, (first, _) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]


def _last_word(text: str, placed: list[tuple[int, int]], before: int) -> int | None:
    """Where the last word behind a space begins that is a token's beginning, too."""
    for _, place in reversed(placed):
        if place <= before and place > placed[0][1] and text[place].isalnum() and text[place - 1].isspace():
            return place
    return None
