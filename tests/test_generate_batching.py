"""Many prompts: each answered as alone, in batches that fit, halved when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import CONTEXT, fresh, tokenizer, toy

from lowmem.errors import BadInput, Cancelled, OutOfMemory, is_out_of_memory
from lowmem.events import CancelToken, Chunk, Completion, Step
from lowmem.generate.batching import run_batches
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import encode_prompt
from lowmem.generate.text import stream

GREEDY = GenerateOptions(max_new_tokens=12, greedy=True)
PROMPTS = ["b" * 3, "a longer prompt than most", "x", "two words", "yy", "the longest prompt of them all, by far", "z"]


def run(
    model: Any, options: GenerateOptions = GREEDY, prompts: Sequence[str] = PROMPTS, **more: Any
) -> list[Step | Completion]:
    more = {"context": CONTEXT, "cancel": CancelToken(), **more}
    return list(run_batches(model, tokenizer(), prompts, options, **more))


def completions(events: Sequence[Step | Completion]) -> list[Completion]:
    return sorted((e for e in events if isinstance(e, Completion)), key=lambda c: (c.index, c.sequence))


def alone(text: str, options: GenerateOptions, context: int = CONTEXT) -> list[tuple[str, int, str | None]]:
    """(text, tokens, finish) of every answer to one prompt, streamed by itself."""
    ids = encode_prompt(tokenizer(), text)
    events = stream(toy("llama"), tokenizer(), ids, options, context=context, cancel=CancelToken())
    chunks = [event for event in events if isinstance(event, Chunk)]
    answers = [[chunk for chunk in chunks if chunk.index == i] for i in range(options.num_return_sequences)]
    return [("".join(c.text for c in answer), answer[-1].new_tokens, answer[-1].finish) for answer in answers]


def sizes_seen(model: Any) -> list[int]:
    """Rows of every forward pass to come."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, inputs: sizes.append(inputs["input_ids"].shape[0]), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_prompt_is_answered_as_alone(batch_size: int) -> None:
    results = completions(run(toy("llama"), batch_size=batch_size))
    assert [c.index for c in results] == list(range(len(PROMPTS)))
    assert [c.prompt for c in results] == PROMPTS
    assert [[(c.text, c.new_tokens, c.finish)] for c in results] == [alone(text, GREEDY) for text in PROMPTS]
    assert results[0].prompt_tokens == len(encode_prompt(tokenizer(), PROMPTS[0]))


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    options = GenerateOptions(max_new_tokens=8, seed=5, num_return_sequences=2, temperature=1.5)
    one, many = (completions(run(toy("llama"), options, batch_size=size)) for size in (1, 5))
    assert [c.text for c in one] == [c.text for c in many]
    assert [c.sequence for c in one] == [0, 1] * len(PROMPTS)
    assert [c.text for c in one[:2]] == [text for text, _, _ in alone(PROMPTS[0], options)]


def test_answers_near_the_end_of_the_context_are_shortened_one_by_one() -> None:
    longest = max(len(encode_prompt(tokenizer(), text)) for text in PROMPTS)
    options = replace(GREEDY, max_new_tokens=40)
    results = completions(run(toy("llama"), options, context=longest + 5, batch_size=8))
    expected = [alone(text, options, longest + 5) for text in PROMPTS]
    assert [[(c.text, c.new_tokens, c.finish)] for c in results] == expected
    assert min(c.new_tokens for c in results) <= 5


def test_completions_come_as_each_batch_ends_longest_prompts_first() -> None:
    events = run(toy("llama"), batch_size=2)
    order = [event.index for event in events if isinstance(event, Completion)]
    assert order[:2] == [5, 1]
    first = next(i for i, event in enumerate(events) if isinstance(event, Completion))
    assert any(isinstance(event, Step) for event in events[first:])
    assert {event.total for event in events if isinstance(event, Step)} == {len(PROMPTS)}


def test_the_largest_batch_that_fits_is_chosen() -> None:
    asked: list[tuple[int, int]] = []

    def fits(longest: int, batch: int) -> bool:
        asked.append((longest, batch))
        return batch <= 5

    model = fresh("llama")
    sizes = sizes_seen(model)
    run(model, fits=fits)
    assert sizes[0] == 4
    assert max(sizes) == 4
    assert asked[0] == (len(encode_prompt(tokenizer(), PROMPTS[5])), 2)


def _crowded(most: int, error: Exception) -> Any:
    """A toy that runs out of memory with more than `most` rows, once it is writing."""
    model = fresh("llama")

    def fail(_module: Any, _args: Any, inputs: dict[str, torch.Tensor]) -> None:
        rows, tokens = inputs["input_ids"].shape
        if rows > most and tokens == 1:
            raise error

    model.register_forward_pre_hook(fail, with_kwargs=True)
    return model


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    MemoryError(),
    OutOfMemory("The budget of 4.00 GB is reached."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch_and_goes_on(error: Exception) -> None:
    model = _crowded(2, error)
    sizes = sizes_seen(model)
    events = run(model, batch_size=7)
    notes = [event.note for event in events if isinstance(event, Step) and "Out of memory" in event.note]
    assert notes == [
        "Out of memory with 7 prompts at a time: continuing with 3.",
        "Out of memory with 3 prompts at a time: continuing with 1.",
    ]
    assert [[(c.text, c.new_tokens, c.finish)] for c in completions(events)] == [
        alone(text, GREEDY) for text in PROMPTS
    ]
    assert sizes[-1] == 1


def test_one_prompt_too_much_is_an_error_that_names_it() -> None:
    with pytest.raises(OutOfMemory, match="Prompt 6 does not fit"):
        run(_crowded(0, MemoryError()), batch_size=2)


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run(_crowded(0, RuntimeError("shape mismatch")))
    assert not is_out_of_memory(ValueError("out of memory"))
    assert all(map(is_out_of_memory, OUT_OF_MEMORY))


def test_a_bad_prompt_is_named_before_anything_runs() -> None:
    model = fresh("llama")
    sizes = sizes_seen(model)
    with pytest.raises(BadInput, match="Prompt 2 of 3: The prompt is empty"):
        run(model, prompts=["a", " ", "b"])
    with pytest.raises(BadInput, match=r"Prompt 1 of 2: The prompt has [\d,]+ tokens"):
        run(model, prompts=["a" * CONTEXT, "b"])
    with pytest.raises(BadInput, match="no prompt"):
        run(model, prompts=[])
    assert sizes == []


def test_stop_leaves_what_is_finished() -> None:
    cancel = CancelToken()
    results = []
    events = run_batches(toy("llama"), tokenizer(), PROMPTS, GREEDY, context=CONTEXT, cancel=cancel, batch_size=2)
    with pytest.raises(Cancelled):  # noqa: PT012
        for event in events:
            if isinstance(event, Completion):
                results.append(event)
                cancel.set()
    assert [c.index for c in results] == [5, 1]


def test_raw_completes_the_texts() -> None:
    results = completions(run(toy("llama"), raw=True))
    assert [c.prompt_tokens for c in results] == [len(text) for text in PROMPTS]
