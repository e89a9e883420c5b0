"""Many prompts: batches of similar length, as large as memory allows, halved when it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowmem.errors import BadInput, OutOfMemory
from lowmem.events import CancelToken, Completion, Step
from lowmem.generate.decoding import decode, drawn_seed, nothing
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import check_length, encode_prompt
from lowmem.generate.text import Answer, advance, eos_ids
from lowmem.machine.monitor import release_memory
from lowmem.machine.oom import is_out_of_memory

log = logging.getLogger("lowmem.batching")

LARGEST_BATCH = 64
DEFAULT_BATCH = 8
TOKENS_PER_STEP = 8
"""A progress step is worth so many tokens a sequence."""

Fits = Callable[[int, int], bool]
"""(tokens of the longest prompt, prompts at once) -> does it fit the budget?"""


@dataclass(frozen=True, slots=True)
class _Prompt:
    index: int
    text: str
    ids: list[int]
    limit: int


def run_batches(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    options: GenerateOptions,
    *,
    context: int,
    cancel: CancelToken,
    check: Callable[[], None] = nothing,
    batch_size: int | None = None,
    fits: Fits | None = None,
    raw: bool = False,
) -> Iterator[Step | Completion]:
    """Answer every prompt as it would be answered alone; completions come as each batch ends.

    Longest prompts go first: they show at once whether the batch is too large, and prompts
    of similar length waste little on padding. Completions name the prompt's index.

    Args:
        context: tokens the model can hold, see `stream`.
        check: called before every forward pass, may raise.
        batch_size: most prompts at once; by default the largest power of two that `fits`.
        raw: complete the texts instead of answering them, see `encode_prompt`.

    Raises:
        BadInput: no prompts, or one that is empty or too long; the message has its number.
        OutOfMemory: a single prompt is too much.
        Cancelled: the completions so far have been yielded.
    """
    waiting = sorted(_encoded(tokenizer, prompts, options, context, raw), key=lambda prompt: -len(prompt.ids))
    options = replace(options, seed=drawn_seed(options.seed))
    most = batch_size or LARGEST_BATCH
    while waiting:
        size = _size(waiting, min(most, len(waiting)), batch_size, fits)
        done = len(prompts) - len(waiting)
        try:
            yield from _answers(model, tokenizer, waiting[:size], options, cancel, check, (done, len(prompts)))
            waiting = waiting[size:]
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise _too_large(waiting[0]) from error
            log.info("out of memory with %d prompts at once", size, exc_info=True)
        # Only here, after the handler, is the failed batch's cache garbage.
        release_memory()
        most = size // 2
        yield Step(done, len(prompts), f"Out of memory with {size} prompts at once: going on with {most}.", "prompts")


def _encoded(
    tokenizer: Any, prompts: Sequence[str], options: GenerateOptions, context: int, raw: bool
) -> Iterator[_Prompt]:
    if not prompts:
        raise BadInput("There is no prompt.", "Give one prompt a line.")
    for index, text in enumerate(prompts):
        try:
            ids = encode_prompt(tokenizer, text, raw)
            limit, _ = check_length(len(ids), options.max_new_tokens, context)
        except BadInput as error:
            raise BadInput(f"Prompt {index + 1} of {len(prompts)}: {error.message}", error.hint) from error
        yield _Prompt(index, text, ids, limit)


def _size(waiting: Sequence[_Prompt], most: int, batch_size: int | None, fits: Fits | None) -> int:
    if batch_size is not None:
        return most
    if fits is None:
        return min(most, DEFAULT_BATCH)
    size = 1
    while size < most and fits(len(waiting[0].ids), min(2 * size, most)):
        size *= 2
    return min(size, most)


def _answers(
    model: nn.Module,
    tokenizer: Any,
    batch: Sequence[_Prompt],
    options: GenerateOptions,
    cancel: CancelToken,
    check: Callable[[], None],
    progress: tuple[int, int],
) -> Iterator[Step | Completion]:
    """Progress of one batch, then its completions."""
    copies = options.num_return_sequences
    ends = frozenset[int]() if options.unbounded else eos_ids(model, tokenizer)
    owners = [prompt for prompt in batch for _ in range(copies)]
    seeds = [options.seed + prompt.index * copies + copy for prompt in batch for copy in range(copies)]
    answers = [Answer(tokenizer, prompt.ids, options.stop, ends, prompt.limit) for prompt in owners]
    texts = [""] * len(answers)
    ended: set[int] = set()
    options = replace(options, max_new_tokens=max(prompt.limit for prompt in batch))
    ids = [prompt.ids for prompt in batch]
    made = 0
    run = decode(model, ids, options, eos_ids=ends, cancel=cancel, check=check, seeds=seeds, ended=ended)
    with closing(run):
        for event in run:
            if isinstance(event, Step):
                yield Step(*progress, f"{len(batch)} at once: read {event.done} of {event.total} tokens", "prompts")
                continue
            for sequence, text in advance(answers, event, ended):
                texts[sequence] += text
            made += 1
            if made % TOKENS_PER_STEP == 0:
                yield Step(*progress, f"{len(batch)} at once: {made} tokens each", "prompts")
    for sequence, prompt in enumerate(owners):
        yield _completion(prompt, sequence % copies, answers[sequence], texts[sequence])


def _completion(prompt: _Prompt, sequence: int, answer: Answer, text: str) -> Completion:
    return Completion(
        index=prompt.index,
        prompt=prompt.text,
        text=text,
        sequence=sequence,
        prompt_tokens=len(prompt.ids),
        new_tokens=answer.tokens,
        finish=answer.finish or "length",
    )


def _too_large(prompt: _Prompt) -> OutOfMemory:
    size = f"{len(prompt.ids):,} tokens and up to {prompt.limit:,} new ones"
    return OutOfMemory(
        f"Prompt {prompt.index + 1} alone, {size}, is too much for the memory.",
        "Lower the new tokens, store the KV cache in int8, or load the model in a smaller precision.",
    )
