"""What a model remembers of a long text: a fact is told, much else follows, and the fact is asked for.

A window does not extend what a model can recall. This shows it: within the window the fact is found again,
once it has left the window it is gone, sinks or not.
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

FACT, QUESTION = "\n\nRemember this: the secret word is {word}.\n\n", "\n\nRemember this: the secret word is"
REST = 160
"""More tokens than stand around the text between the two."""

WORDS = ("orange", "castle", "river", "winter", "garden", "silver", "doctor", "window", "planet", "yellow")


@dataclass(frozen=True, slots=True)
class Recall:
    """How well a fact was recalled.

    Args:
        distance: tokens between the fact and the question.
        probability: that the model gives to the right word, geometric mean over the words that were hidden.
        by_chance: the same to words that were never told.
    """

    distance: int
    probability: float
    by_chance: float

    @property
    def remembered(self) -> bool:
        """At least half as sure as not, or ten times as likely as a word that was never told."""
        return self.probability > 0.5 or self.probability > 10 * self.by_chance


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
    """Hide a word `distance` tokens before it is asked for, with the cache that `options` name.

    Args:
        filler: tokens of some other text, at least `distance`.

    Raises:
        BadInput: too little filler.
    """
    if len(filler) < distance:
        raise BadInput(f"The text has {len(filler):,} tokens, fewer than {distance:,}.", "Give a longer text.")
    words = Random(0).sample(WORDS, 2 * trials)
    told: list[float] = []
    never: list[float] = []
    for trial in range(trials):
        word, other = words[2 * trial], words[2 * trial + 1]
        for asked, found in ((word, told), (other, never)):
            fact, question, answer = (
                tokenizer(part, add_special_tokens=False)["input_ids"]
                for part in (FACT.format(word=word), QUESTION, f" {asked}")
            )
            # The beginning is another text's, for what stands first is kept as a sink.
            ids = [*filler[-32:], *fact, *filler[:distance], *question, *answer]
            reader = Reader(model, ids, options)
            surprise = [float(value) for part in reader.read(len(ids), cancel, check) for value in part]
            found.append(sum(surprise[-len(answer) :]))
    return Recall(distance, *(math.exp(-sum(found) / trials) for found in (told, never)))
