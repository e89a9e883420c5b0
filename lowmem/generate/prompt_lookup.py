"""Lookahead by prompt lookup: what followed the same tokens before is guessed, and a whole guess is checked in one pass.

Text often repeats itself: code, quotations, names, tables. A pass over a few tokens reads the weights once, as one over a
single token does. A guess counts only where it is the model's own greedy choice. Sums are rounded differently in passes of
different length, so a choice between two tokens that are nearly alike is left to a pass over one token, as without lookahead.

Saxena, Prompt Lookup Decoding, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowmem.generate.options import GenerateOptions

SIZES = (3, 2)
"""Tokens that must have occurred before, the longer run first."""

FIRST_DRAFT = 2
"""Tokens of the first guess; twice as many as held last time are tried next."""

CLOSE = 0.05
"""Logits so near each other are not told apart by a pass over several tokens."""


_ROUNDING = ("lowmem.kernels", "bitsandbytes")
"""Where layers come from that round activations: the smallest difference may then grow to a whole step."""


def applies(options: GenerateOptions, rows: int, model: Any) -> bool:
    """Only where it cannot change a word: greedy, one text, computed in fp32."""
    if options.prompt_lookup_num_tokens < 1 or rows != 1 or not options.greedy or options.repetition_penalty != 1.0:
        return False
    plain = options.use_cache and not options.window and options.cache_type == "same"
    return plain and _is_exact(model)


def _is_exact(model: Any) -> bool:
    if model.dtype != torch.float32 or not getattr(model, "exact", True):
        return False
    return not any(type(module).__module__.startswith(_ROUNDING) for module in model.modules())


class PromptLookup:
    """Remembers what followed every run of tokens."""

    def __init__(self, text: Iterable[int], longest: int) -> None:
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        self._longest, self._count = longest, min(longest, FIRST_DRAFT)
        self.add(text)

    def add(self, tokens: Iterable[int]) -> None:
        """Tokens that are certain."""
        text = self._text
        for token in tokens:
            for size in SIZES:
                if len(text) >= size:
                    self._followers[tuple(text[-size:])] = len(text)
            text.append(token)

    def draft(self, room: int) -> list[int]:
        """At most `room` tokens, none where the text's end is new."""
        ends = (self._followers.get(tuple(self._text[-size:])) for size in SIZES)
        start = next((end for end in ends if end is not None), len(self._text))
        return self._text[start : start + min(room, self._count)]

    def accepted(self, tokens: int) -> None:
        """So many of the last guess were right."""
        self._count = min(self._longest, max(FIRST_DRAFT, 2 * tokens))


def accepted(logits: Tensor, choices: list[int], draft: list[int]) -> list[int]:
    """The tokens that a pass decides: draft that hold, and the choice behind them.

    Args:
        logits: [1 + draft, vocab], after the last certain token and after every guess.
        choices: the best token of each.
    """
    if not draft:
        return choices
    best = logits.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1] > CLOSE).tolist()
    found: list[int] = []
    for choice, is_clear, guess in zip(choices, clear, [*draft, None], strict=True):
        if not is_clear:
            break
        found.append(choice)
        if choice != guess:
            break
    return found
