"""From tokens to text: streams one sequence, or several for the same prompt. `prompts` goes from text to tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from torch import nn

from lowmem.errors import Cancelled
from lowmem.events import CancelToken, Chunk, Step
from lowmem.generate.decoding import Tokens, decode, no_check
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import check_length

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_PREFIX_TOKENS = 6
_LONGEST_CHARACTER = 8
"""Upper bound of the tokens that make up one character; UTF-8 has up to 4 bytes per character."""


class Detokenizer:
    """Incremental detokenizer of one sequence, without special tokens.

    A token's text depends on its neighbors: tokenizers drop leading spaces at the beginning of a decoded text, and a
    character may span several tokens. So the new text is the difference between a short window of tokens decoded with
    and without the new token, and it is held back while it ends within a character, as in text-generation-inference
    and vLLM.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-_PREFIX_TOKENS:])
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._shown
        if len(text) <= len(self._shown_text) or (text.endswith(_BROKEN) and waiting < _LONGEST_CHARACTER):
            return ""
        new = text[len(self._shown_text) :]
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)
        return new

    def flush(self) -> str:
        """The text held back so far, without an incomplete character at its end."""
        return self._decode(self._window)[len(self._shown_text) :].rstrip(_BROKEN)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back text that may be the beginning of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show; empty once a stop string has been found."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found = True
            return text[: min(places)]
        keep = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """The text held back that turned out to be no stop string."""
        held, self._held = self._held, ""
        return "" if self.found else held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class SequenceText:
    """Turns the tokens of one sequence into text and decides when the sequence ends.

    `finish` is None until then; afterwards "eos", "stop" (a stop string), "length", or the argument of `end`.
    """

    def __init__(
        self, tokenizer: Any, prompt_ids: Sequence[int], stops: Iterable[str], eos_ids: frozenset[int], limit: int
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._eos_ids = eos_ids
        self._limit = limit
        self.tokens = 0
        self.finish: str | None = None

    def push(self, token: int) -> str:
        """The text to show for `token`, possibly empty."""
        self.tokens += 1
        if token in self._eos_ids:
            return self.end("eos")
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.found:
            self.finish = "stop"
        elif self.tokens >= self._limit:
            text += self.end("length")
        return text

    def end(self, finish: str) -> str:
        """End the sequence; returns the text that was held back."""
        text = self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        self.finish = "stop" if self._stops.found else finish
        return text


def advance(sequences: Sequence[SequenceText], tokens: Tokens, ended: set[int]) -> Iterator[tuple[int, str]]:
    """Pass every sequence its new token; yields (index, text to show) and adds finished sequences to `ended`."""
    for index, token in enumerate(tokens.ids):
        if token is not None:
            text = sequences[index].push(token)
            if sequences[index].finish:
                ended.add(index)
            yield index, text


def eos_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """The end-of-sequence tokens of the model's generation config and of the tokenizer."""
    named = [getattr(getattr(model, "generation_config", None), "eos_token_id", None), tokenizer.eos_token_id]
    ids = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named]
    return frozenset(token for group in ids for token in group if token is not None)


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    options: GenerateOptions,
    *,
    context: int,
    cancel: CancelToken,
    check: Callable[[], None] = no_check,
) -> Iterator[Step | Chunk]:
    """Stream `options.num_return_sequences` continuations of one prompt.

    The last chunk of every sequence has its `finish`. Stop before the first token raises `Cancelled`; later it ends the
    sequences with "cancelled" and returns.

    Args:
        context: tokens of prompt and continuation together that fit; a longer `max_new_tokens` is reduced, and a `Step`
            says so.
        check: called before every forward pass; may raise.

    Raises:
        BadInput: the prompt is empty or longer than the context.
        CorruptModel, Unsupported, Cancelled: see `decode`.
    """
    limit, note = check_length(len(prompt_ids), options.max_new_tokens, context)
    if note:
        yield Step(0, len(prompt_ids), note, "tokens")
    options = replace(options, max_new_tokens=limit)
    ends = frozenset[int]() if options.unbounded else eos_ids(model, tokenizer)
    sequences = [
        SequenceText(tokenizer, prompt_ids, options.stop, ends, limit) for _ in range(options.num_return_sequences)
    ]
    ended: set[int] = set()
    clock = _Clock(len(prompt_ids), context)
    run = decode(model, [prompt_ids], options, eos_ids=ends, cancel=cancel, check=check, ended=ended)
    try:
        with closing(run):
            for event in run:
                if isinstance(event, Step):
                    yield event
                    continue
                clock.tick()
                for index, text in advance(sequences, event, ended):
                    if text or sequences[index].finish:
                        yield clock.chunk(index, sequences[index], text)
    except Cancelled:
        if not clock.started:
            raise
        for index, answer in enumerate(sequences):
            if not answer.finish:
                text = answer.end("cancelled")
                yield clock.chunk(index, answer, text)


class _Clock:
    """Measures the speed of one generation for its chunks."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        self._prompt_tokens, self._context = prompt_tokens, context
        self._start = time.perf_counter()
        self._first = self._latest = 0.0

    @property
    def started(self) -> bool:
        """Whether a token has been generated."""
        return self._first > 0

    def tick(self) -> None:
        """Record the arrival of new tokens."""
        self._latest = time.perf_counter()
        self._first = self._first or self._latest

    def chunk(self, index: int, answer: SequenceText, text: str) -> Chunk:
        to_first, since = self._first - self._start, self._latest - self._first
        return Chunk(
            text=text,
            index=index,
            prompt_tokens=self._prompt_tokens,
            new_tokens=answer.tokens,
            context_limit=self._context,
            seconds_to_first=to_first,
            prefill_tps=self._prompt_tokens / to_first if to_first > 0 else 0.0,
            decode_tps=(answer.tokens - 1) / since if since > 0 else 0.0,
            finish=answer.finish,
        )
