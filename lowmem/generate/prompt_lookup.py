"""Prompt lookup decoding: draft the tokens that followed the same n-gram earlier in the text, and verify them in one pass.

Text such as code, quotations, names and tables repeats itself, and a pass over several tokens reads the weights only
once, like a pass over one token. A draft token is accepted only if it is the model's own greedy choice. Rounding differs
between passes of different length, so a choice between two nearly equal logits is left to a pass over one token: the
output is the same as without prompt lookup.

Source: Saxena, Prompt Lookup Decoding, 2023, https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowmem.generate.options import GenerateOptions

NGRAM_SIZES = (3, 2)
"""Lengths of the n-grams that are looked up, the longer one first."""

FIRST_DRAFT = 2
"""Tokens of the first draft; later drafts have twice as many tokens as were accepted last time."""

CLOSE = 0.05
"""Logits closer than this may swap order between a pass over one token and a pass over several."""

_ROUNDING = ("lowmem.kernels", "bitsandbytes")
"""Packages of layers that round activations, where a tiny difference may grow to a whole quantization step."""


def applies(options: GenerateOptions, rows: int, model: Any) -> bool:
    """Whether prompt lookup cannot change the output: one greedy sequence, computed in fp32 with a full, exact cache."""
    if options.prompt_lookup_num_tokens < 1 or rows != 1 or not options.greedy:
        return False
    if options.repetition_penalty not in (None, 1.0):
        return False
    plain = options.use_cache and not options.window and options.cache_type == "same"
    return plain and is_exact(model)


def is_exact(model: Any) -> bool:
    """Whether `model` computes in fp32 with nothing rounded."""
    if model.dtype != torch.float32 or not getattr(model, "exact", True):
        return False
    return not any(type(module).__module__.startswith(_ROUNDING) for module in model.modules())


class PromptLookup:
    """Maps every n-gram of a text to the position after its latest occurrence."""

    def __init__(self, text: Iterable[int], max_tokens: int) -> None:
        self._text: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}
        self._max_tokens, self._tokens = max_tokens, min(max_tokens, FIRST_DRAFT)
        self.add(text)

    def add(self, tokens: Iterable[int]) -> None:
        """Append verified tokens to the text."""
        text = self._text
        for token in tokens:
            for size in NGRAM_SIZES:
                if len(text) >= size:
                    self._followers[tuple(text[-size:])] = len(text)
            text.append(token)

    def draft(self, room: int) -> list[int]:
        """At most `room` draft tokens; none if the text's last tokens have not occurred before."""
        ends = (self._followers.get(tuple(self._text[-size:])) for size in NGRAM_SIZES)
        start = next((end for end in ends if end is not None), len(self._text))
        return self._text[start : start + min(room, self._tokens)]

    def adapt(self, accepted: int) -> None:
        """Set the length of the next draft from how many tokens of the last one were accepted."""
        self._tokens = min(self._max_tokens, max(FIRST_DRAFT, 2 * accepted))


def accepted(logits: Tensor, choices: list[int], draft: list[int]) -> list[int]:
    """The tokens that a verification pass yields: the accepted draft tokens and the model's choice after them.

    Args:
        logits: [1 + draft, vocab], after the last verified token and after every draft token.
        choices: the most likely token of each row of `logits`.
    """
    if not draft:
        return choices
    best = logits.topk(2, dim=-1).values
    clear = (best[:, 0] - best[:, 1] > CLOSE).tolist()
    found: list[int] = []
    for choice, is_clear, proposed in zip(choices, clear, [*draft, None], strict=True):
        if not is_clear:
            break
        found.append(choice)
        if choice != proposed:
            break
    return found
