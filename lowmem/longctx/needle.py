"""Needle-in-a-haystack test: state a fact, let other text follow, and ask for the fact.

A windowed cache does not extend what a model can recall: within the window the fact is found again; once it has been
evicted it is lost, with or without sinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.generate.decoding import no_check
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.reading import Reader
from lowmem.messages import msg

FACT, QUESTION = "\n\nRemember this: the secret word is {word}.\n\n", "\n\nRemember this: the secret word is"
OVERHEAD_TOKENS = 160
"""Upper bound for the tokens of the prompt other than the text between fact and question."""

WORDS = ("orange", "castle", "river", "winter", "garden", "silver", "doctor", "window", "planet", "yellow")


@dataclass(frozen=True, slots=True)
class Recall:
    """How well a fact was recalled.

    Args:
        distance: tokens between the fact and the question.
        probability: that the model assigns to the right word, geometric mean over trials.
        control: the same for a control word that does not occur in the text.
    """

    distance: int
    probability: float
    control: float

    @property
    def recalled(self) -> bool:
        """Whether the right word has a probability above 50 %, or more than ten times that of the control word."""
        return self.probability > 0.5 or self.probability > 10 * self.control


def recall(
    model: Any,
    tokenizer: Any,
    filler: Sequence[int],
    options: GenerateOptions,
    distance: int,
    *,
    trials: int = 3,
    cancel: CancelToken | None = None,
    check: Callable[[], None] = no_check,
) -> Recall:
    """Place a word `distance` tokens before the question for it, with the KV cache described by `options`.

    Args:
        filler: token ids of unrelated text, at least `distance`.
        trials: number of words to test.

    Raises:
        BadInput: too little filler.
    """
    if len(filler) < distance:
        raise BadInput(
            msg("The text has {filler:,} tokens, fewer than {distance:,}.", filler=len(filler), distance=distance),
            msg("Use a longer text."),
        )
    words = Random(0).sample(WORDS, 2 * trials)
    right: list[float] = []
    control: list[float] = []
    for trial in range(trials):
        word, other = words[2 * trial], words[2 * trial + 1]
        for candidate, losses in ((word, right), (other, control)):
            fact, question, answer = (
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (FACT.format(word=word), QUESTION, f" {candidate}")
            )
            # Start with filler, because the first tokens stay cached as sinks.
            ids = [*filler[-32:], *fact, *filler[:distance], *question, *answer]
            reader = Reader(model, ids, options)
            nll = [float(value) for part in reader.read(len(ids), cancel, check) for value in part]
            losses.append(sum(nll[-len(answer) :]))
    return Recall(distance, *(math.exp(-sum(losses) / trials) for losses in (right, control)))
