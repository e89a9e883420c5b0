"""The decode loop: token ids of prompts in, one token per sequence and step out.

Works on token ids, a transformers causal language model and its cache, not on text. With greedy decoding the tokens equal
those of transformers' `generate`, and every row of a batch gets the tokens it would get on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import BadInput, CorruptModel
from lowmem.events import CancelToken, Step
from lowmem.generate import prompt_lookup, sampling
from lowmem.generate.options import GenerateOptions, Sampling
from lowmem.generate.processors import Processors, requested
from lowmem.generate.rows import Rows
from lowmem.generate.tokens import check_ids
from lowmem.machine.monitor import HeapTrimmer
from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class Tokens:
    """The new token of each sequence, including the one that ends it; None for sequences that have ended before."""

    ids: tuple[int | None, ...]


def no_check() -> None:
    """The default `check`, which does nothing."""


def resolve_seed(seed: int) -> int:
    """`seed`, or a random one for -1."""
    return seed if seed >= 0 else SystemRandom().randrange(2**31)


@torch.inference_mode()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions,
    *,
    eos_ids: frozenset[int],
    cancel: CancelToken,
    check: Callable[[], None] = no_check,
    seeds: Sequence[int] | None = None,
    ended: Collection[int] = (),
) -> Generator[Step | Tokens, None, None]:
    """Continue every prompt by up to `options.max_new_tokens` tokens.

    What `options` leave open is chosen by the model's generation config, whose logits processors apply too.

    Sequence `p * num_return_sequences + s` is continuation s of prompt p. Each prompt is processed once for all its
    continuations. Prompt and continuation together must fit the model's context.

    Args:
        eos_ids: tokens that end a sequence.
        cancel: checked between the modules of a forward pass, so that Stop does not wait for a long one.
        check: called before every forward pass; an exception it raises ends the generation.
        seeds: one per sequence; by default `options.seed` plus the sequence's index, so that a sequence is sampled the
            same way alone and in a batch.
        ended: sequences the caller needs no more tokens of; it may add to the collection between steps.

    Yields:
        `Step`s while prompts are processed, then `Tokens` for every decoding step.

    Raises:
        BadInput: no prompt, an empty prompt, or ids outside the model's vocabulary.
        CorruptModel: NaN or infinite logits.
        Unsupported: the model has no KV cache.
        Cancelled: `cancel` was set.
    """
    _check_prompts(prompts, decoder_config(model).vocab_size)
    rows = Rows(model, prompts, options)
    blocks = decoder_blocks(model)
    parts = [part for block in blocks for part in block.modules()]
    with cancellable(parts, cancel), tidy_heap(model):
        logits = yield from _prefill(rows, options, cancel, check)
    count = len(prompts) * options.num_return_sequences
    if options.num_return_sequences > 1:
        rows.branch(options.num_return_sequences)
        logits = logits.repeat_interleave(options.num_return_sequences, dim=0)
    generation = getattr(model, "generation_config", None)
    chosen = options.sampling({} if generation is None else vars(generation))
    processors = None
    if fields := requested(generation, chosen.repetition_penalty, eos_ids, logits.shape[-1]):
        texts = [prompt for prompt in prompts for _ in range(options.num_return_sequences)]
        processors = Processors(fields, texts, options.max_new_tokens, eos_ids, logits.device)
        chosen = replace(chosen, repetition_penalty=1.0)
    first = resolve_seed(options.seed)
    randoms = [Random(seed) for seed in seeds or range(first, first + count)]
    # With a cache, one token passes a block quickly, and hooks on every module would slow down each token.
    with cancellable(blocks if options.use_cache else parts, cancel):
        plain = processors is None and chosen.repetition_penalty == 1.0
        if plain and prompt_lookup.applies(options, count, model) and rows.can_crop:
            yield from _decode_with_lookup(rows, logits, options, chosen, eos_ids, cancel, check, ended)
            return
        yield from _decode(rows, logits, randoms, options, chosen, processors, eos_ids, cancel, check, ended)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks in order: the first module list of `num_hidden_layers` modules, else the model itself."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = decoder_config(model).num_hidden_layers
    return list(next((blocks for blocks in lists if len(blocks) == layers), [model]))


def decoder_config(model: Any) -> Any:
    """The transformers configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def _check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    if not prompts or not all(prompts):
        raise BadInput(msg("The prompt is empty."), msg("Write something for the model to continue."))
    check_ids(max(map(max, prompts)), vocabulary)


@contextmanager
def cancellable(modules: Sequence[nn.Module], cancel: CancelToken) -> Iterator[None]:
    """Let Stop interrupt a forward pass before any of `modules`."""
    with _before(modules, cancel.check):
        yield


@contextmanager
def tidy_heap(model: nn.Module) -> Iterator[None]:
    """Keep the heap small in forward passes over many tokens, see `HeapTrimmer`."""
    trimmer, blocks = HeapTrimmer(), decoder_blocks(model)
    parts = [part for block in blocks for part in block.modules() if part is not block]
    with _before(blocks, trimmer.before_block), _before(parts, trimmer.check):
        yield


@contextmanager
def _before(modules: Sequence[nn.Module], call: Callable[[], None]) -> Iterator[None]:
    """`call` before any of `modules` computes."""
    handles = [module.register_forward_pre_hook(lambda *_: call()) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prefill(
    rows: Rows, options: GenerateOptions, cancel: CancelToken, check: Callable[[], None]
) -> Generator[Step, None, Tensor]:
    """Process the prompts in chunks; returns the logits [rows, vocab] after their last tokens."""
    total = rows.length
    yield Step(0, total, msg("Reading the prompt"), "tokens")
    for start, end in rows.parts(options.prefill_chunk):
        cancel.check()
        check()
        logits = rows.logits(start, end)
        yield Step(end, total, msg("Reading the prompt"), "tokens")
    return logits


def _decode(
    rows: Rows,
    logits: Tensor,
    randoms: list[Random],
    options: GenerateOptions,
    chosen: Sampling,
    processors: Processors | None,
    eos_ids: frozenset[int],
    cancel: CancelToken,
    check: Callable[[], None],
    ended: Collection[int],
) -> Iterator[Tokens]:
    """Decode token by token until all sequences have ended; row i holds sequence `live[i]`."""
    count = len(randoms)
    live = list(range(count))
    for made in range(1, options.max_new_tokens + 1):
        with _one_thread(rows.model):
            if processors is not None:
                logits = processors(logits, live)
            new = sampling.next_tokens(
                logits, rows.text[:, : rows.length], chosen, [randoms[sequence] for sequence in live]
            )
        ids = new.tolist()
        _check_numbers(ids, made)
        if processors is not None:
            processors.add(live, ids)
        answer: list[int | None] = [None] * count
        for sequence, token in zip(live, ids, strict=True):
            answer[sequence] = token
        yield Tokens(tuple(answer))
        keep = [row for row, token in enumerate(ids) if token not in eos_ids and live[row] not in ended]
        if not keep or made == options.max_new_tokens:
            return
        cancel.check()
        check()
        if len(keep) < len(live):
            rows.select(keep)
            live, new = [live[row] for row in keep], new[keep]
        rows.append(new)
        logits = rows.logits(rows.length - 1, rows.length)


def _decode_with_lookup(
    rows: Rows,
    logits: Tensor,
    options: GenerateOptions,
    chosen: Sampling,
    eos_ids: frozenset[int],
    cancel: CancelToken,
    check: Callable[[], None],
    ended: Collection[int],
) -> Iterator[Tokens]:
    """`_decode` for one greedy row, with several tokens per pass where draft tokens are accepted."""
    lookup = prompt_lookup.PromptLookup(rows.text[0, : rows.length].tolist(), options.prompt_lookup_num_tokens)
    draft, made = list[int](), 0
    while True:
        with _one_thread(rows.model):
            choices = sampling.next_tokens(logits, rows.text, chosen, ()).tolist()
            _check_numbers(choices, made + 1)
            found = prompt_lookup.accepted(logits, choices, draft)
        for token in found:
            made += 1
            yield Tokens((token,))
            if token in eos_ids or 0 in ended or made == options.max_new_tokens:
                return
        cancel.check()
        check()
        rows.accept(found)
        lookup.add(found)
        if draft:
            lookup.adapt(len(found) - 1)
        draft = lookup.draft(options.max_new_tokens - made - 1) if found else []
        logits = rows.draft_logits(draft)


@contextmanager
def _one_thread(model: Any) -> Iterator[None]:
    """Limit torch to one thread if the model runs on threads of its own (ONNX Runtime).

    Two thread pools that spin on the same cores halve each other's speed.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not getattr(model, "own_threads", False):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_numbers(ids: list[int], made: int) -> None:
    if sampling.NOT_A_TOKEN in ids:
        raise CorruptModel(
            msg("The model produced NaN or infinite logits at token {made} of its answer.", made=made),
            msg("Choose another precision, such as fp32. If that does not help, the weights are damaged."),
        )
