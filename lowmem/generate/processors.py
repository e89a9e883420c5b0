"""The logits processors that a model's generation_config.json asks for: suppressed tokens, bad words, repeated n-grams, ...

They are transformers' own, in the order of its `generate` (`GenerationMixin._get_logits_processor`), so that greedy
decoding gives its tokens. Every sequence has its own, which see its tokens without padding: a row of a batch gets the
tokens that it would get alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

log = logging.getLogger("lowmem.generate")


@dataclass(frozen=True, slots=True)
class _Sequence:
    """Tokens of a prompt, the most tokens of prompt and answer together, and the tokens that end an answer."""

    prompt: int
    most: int
    ends: Tensor

    def ids(self, value: Any) -> Tensor:
        """One or several token ids, where the logits are."""
        return torch.tensor(value, device=self.ends.device).view(-1)


_MAKERS: dict[str, Callable[[Any, _Sequence], Any]] = {
    "sequence_bias": lambda value, _: SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, _: RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, _: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, one: NoBadWordsLogitsProcessor(value, one.ends),
    "min_length": lambda value, one: MinLengthLogitsProcessor(value, one.ends),
    "min_new_tokens": lambda value, one: MinNewTokensLengthLogitsProcessor(one.prompt, value, one.ends),
    "forced_bos_token_id": lambda value, _: ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, one: ForcedEOSTokenLogitsProcessor(one.most, one.ids(value)),
    "exponential_decay_length_penalty": lambda value, one: ExponentialDecayLengthPenalty(
        tuple(value), one.ends, one.prompt
    ),
    "suppress_tokens": lambda value, one: SuppressTokensLogitsProcessor(value, str(one.ends.device)),
    "begin_suppress_tokens": lambda value, one: SuppressTokensAtBeginLogitsProcessor(
        value, one.prompt, str(one.ends.device)
    ),
}
"""Field of a generation config -> its processor, in the order of `generate`."""

_OF_ENDS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
"""Fields that concern the tokens that end an answer."""

_UNSET: tuple[Any, ...] = (None,)
_OFF: tuple[Any, ...] = (None, 0, [], {})
"""Values that ask for nothing: of a token that is forced, which may be token 0, and of the other fields."""


class Processors:
    """The processors of the sequences that are being generated.

    Args:
        fields: what asks for them, see `requested`.
        prompts: of every sequence.
        max_new_tokens: of every sequence.
        eos_ids: tokens that end a sequence.
        device: of the logits.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos_ids: frozenset[int],
        device: torch.device,
    ) -> None:
        self._texts = [list(ids) for ids in prompts]
        ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self._lists = [_made(fields, _Sequence(len(text), len(text) + max_new_tokens, ends)) for text in self._texts]

    def __call__(self, logits: Tensor, live: Sequence[int]) -> Tensor:
        """Processed logits [rows, vocab]; row i is that of sequence `live[i]`."""
        rows = []
        for row, sequence in enumerate(live):
            ids = torch.tensor([self._texts[sequence]], device=logits.device)
            rows.append(self._lists[sequence](ids, logits[row : row + 1]))
        return torch.cat(rows)

    def add(self, live: Sequence[int], tokens: Sequence[int]) -> None:
        """Append the new tokens of the sequences `live`."""
        for sequence, token in zip(live, tokens, strict=True):
            self._texts[sequence].append(token)


def requested(config: Any, penalty: float, eos_ids: frozenset[int], vocabulary: int) -> dict[str, Any]:
    """The fields of a generation config that ask for a processor, {} if none does.

    Args:
        config: transformers' `GenerationConfig`, or None.
        penalty: the repetition penalty. It is among the fields if there are any, since the order of processors matters.
    """
    found = {
        name: value
        for name in _MAKERS
        if name != "repetition_penalty"
        and (value := getattr(config, name, None)) not in (_UNSET if name.startswith("forced") else _OFF)
        and (eos_ids or name not in _OF_ENDS)
        and _works(name, value, vocabulary)
    }
    return found | {"repetition_penalty": float(penalty)} if found and penalty != 1.0 else found


def _made(fields: Mapping[str, Any], sequence: _Sequence) -> Any:
    return LogitsProcessorList(make(fields[name], sequence) for name, make in _MAKERS.items() if name in fields)


def _works(name: str, value: Any, vocabulary: int) -> bool:
    """Whether a field can be applied; a damaged one is left out."""
    try:
        ids = torch.zeros(1, 1, dtype=torch.long)
        _made({name: value}, _Sequence(1, 2, ids[0]))(ids, torch.zeros(1, vocabulary))
    except Exception as error:
        log.warning("generation_config.json: %s = %.80r is ignored: %s", name, value, error)
        return False
    return True
