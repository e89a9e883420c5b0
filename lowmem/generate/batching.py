"""Batched generation: prompts of similar length in batches as large as memory allows, halved when it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowmem.errors import BadInput, OutOfMemory, is_out_of_memory
from lowmem.events import CancelToken, Completion, Step
from lowmem.generate.cache.capability import cache_use
from lowmem.generate.decoding import decode, no_check, resolve_seed
from lowmem.generate.options import LARGEST_BATCH, GenerateOptions
from lowmem.generate.prompts import check_length, encode_prompt
from lowmem.generate.text import SequenceText, advance, eos_ids
from lowmem.machine.monitor import release_memory
from lowmem.messages import msg

log = logging.getLogger("lowmem.batching")


DEFAULT_BATCH = 8
TOKENS_PER_STEP = 8
"""Tokens per sequence between two progress steps."""

Fits = Callable[[int, int], bool]
"""(tokens of the longest prompt, batch size) -> whether it fits the budget."""


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
    check: Callable[[], None] = no_check,
    batch_size: int | None = None,
    fits: Fits | None = None,
    raw: bool = False,
) -> Iterator[Step | Completion]:
    """Complete every prompt with the result it would get alone; yields completions as each batch ends.

    The longest prompts come first: they show early whether the batch is too large, and prompts of similar length need
    little padding. Completions carry the prompt's index.

    Args:
        context: tokens that fit the model, see `stream`.
        check: called before every forward pass; may raise.
        batch_size: most prompts per batch, fewer where they do not fit; by default the largest power of two that `fits`.
        fits: may raise where a single prompt does not fit.
        raw: complete the texts without the chat template, see `encode_prompt`.

    Raises:
        BadInput: no prompts, or one that is empty or too long; the message gives its number.
        OutOfMemory: a single prompt does not fit.
        Cancelled: completions so far have been yielded.
    """
    waiting = sorted(_encoded(tokenizer, prompts, options, context, raw, cancel), key=lambda prompt: -len(prompt.ids))
    options = replace(options, seed=resolve_seed(options.seed))
    most, padded = batch_size or LARGEST_BATCH, _pads(model, options)
    while waiting:
        wanted = min(most, _together(waiting, padded))
        size = _size(waiting, wanted, batch_size, fits)
        done = len(prompts) - len(waiting)
        if batch_size is not None and size < wanted:
            most = size
            yield Step(done, len(prompts), lowered(wanted, size), "prompts")
        try:
            yield from _run_batch(model, tokenizer, waiting[:size], options, cancel, check, (done, len(prompts)))
            waiting = waiting[size:]
            continue
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise _too_large(waiting[0]) from error
            log.info("out of memory with a batch of %d", size, exc_info=True)
        # Only after the handler is the failed batch's cache garbage.
        release_memory()
        most = size // 2
        yield Step(
            done,
            len(prompts),
            msg("Out of memory with {size} prompts at a time: continuing with {most}.", size=size, most=most),
            "prompts",
        )


def lowered(wanted: int, size: int) -> str:
    """The note for a batch size that the budget does not allow."""
    return msg("{wanted} prompts at a time do not fit the budget: {size} at a time.", wanted=wanted, size=size)


def _encoded(
    tokenizer: Any, prompts: Sequence[str], options: GenerateOptions, context: int, raw: bool, cancel: CancelToken
) -> Iterator[_Prompt]:
    if not prompts:
        raise BadInput(msg("There are no prompts."), msg("Write one prompt per line."))
    for index, text in enumerate(prompts):
        try:
            ids = encode_prompt(tokenizer, text, raw, cancel)
            limit, _ = check_length(len(ids), options.max_new_tokens, context)
        except BadInput as error:
            raise BadInput(
                msg(
                    "Prompt {index} of {prompts}: {message}",
                    index=index + 1,
                    prompts=len(prompts),
                    message=error.message,
                ),
                error.hint,
            ) from error
        yield _Prompt(index, text, ids, limit)


def _pads(model: Any, options: GenerateOptions) -> bool:
    """Whether rows of different lengths can be one batch; a window's masks mean nothing to layers that keep a state."""
    use = cache_use(model)
    return use.padded and not (use.states and options.window)


def _together(waiting: Sequence[_Prompt], padded: bool) -> int:
    """How many of the first prompts can be one batch: without padding, those of the same length."""
    lengths = [len(prompt.ids) for prompt in waiting]
    return len(lengths) if padded else lengths.count(lengths[0])


def _size(waiting: Sequence[_Prompt], most: int, batch_size: int | None, fits: Fits | None) -> int:
    longest = len(waiting[0].ids)
    if fits is None:
        return min(most, batch_size or DEFAULT_BATCH)
    if batch_size is not None or most == 1:
        while not fits(longest, most) and most > 1:
            most //= 2
        return most
    size = 1
    while size < most and fits(longest, min(2 * size, most)):
        size *= 2
    return min(size, most)


def _run_batch(
    model: nn.Module,
    tokenizer: Any,
    batch: Sequence[_Prompt],
    options: GenerateOptions,
    cancel: CancelToken,
    check: Callable[[], None],
    progress: tuple[int, int],
) -> Iterator[Step | Completion]:
    """Yields the progress of one batch, then its completions."""
    copies = options.num_return_sequences
    ends = frozenset[int]() if options.unbounded else eos_ids(model, tokenizer)
    owners = [prompt for prompt in batch for _ in range(copies)]
    seeds = [options.seed + prompt.index * copies + copy for prompt in batch for copy in range(copies)]
    sequences = [SequenceText(tokenizer, prompt.ids, options.stop, ends, prompt.limit) for prompt in owners]
    texts = [""] * len(sequences)
    ended: set[int] = set()
    options = replace(options, max_new_tokens=max(prompt.limit for prompt in batch))
    ids = [prompt.ids for prompt in batch]
    made = 0
    run = decode(model, ids, options, eos_ids=ends, cancel=cancel, check=check, seeds=seeds, ended=ended)
    with closing(run):
        for event in run:
            if isinstance(event, Step):
                yield Step(
                    *progress,
                    msg(
                        "Batch of {batch}: {done} of {total} prompt tokens",
                        batch=len(batch),
                        done=event.done,
                        total=event.total,
                    ),
                    msg("prompts"),
                )
                continue
            for sequence, text in advance(sequences, event, ended):
                texts[sequence] += text
            made += 1
            if made % TOKENS_PER_STEP == 0:
                yield Step(
                    *progress,
                    msg("Batch of {batch}: {made} new tokens each", batch=len(batch), made=made),
                    msg("prompts"),
                )
    for sequence, prompt in enumerate(owners):
        yield _completion(prompt, sequence % copies, sequences[sequence], texts[sequence])


def _completion(prompt: _Prompt, sequence: int, answer: SequenceText, text: str) -> Completion:
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
    return OutOfMemory(
        msg(
            "Prompt {index} does not fit in memory even alone, with {ids:,} tokens and up to {limit:,} new ones.",
            index=prompt.index + 1,
            ids=len(prompt.ids),
            limit=prompt.limit,
        ),
        msg("Generate fewer tokens, use an int8 KV cache, or load the model in a smaller precision."),
    )
