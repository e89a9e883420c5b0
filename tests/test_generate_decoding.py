"""The decode loop against `transformers.generate`, token for token, and what interrupts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from toys import EOS, NAMES, WINDOW, fresh, prompt, toy

from lowmem.errors import BadInput, Cancelled, CorruptModel, OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.generate.decoding import Tokens, decode, decoder_blocks
from lowmem.generate.options import GenerateOptions

GREEDY = GenerateOptions(max_new_tokens=20, greedy=True)
EOS_IDS = frozenset({EOS})


def ours(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], options: GenerateOptions, **more: object
) -> list[list[int]]:
    eos_ids = more.pop("eos_ids", EOS_IDS)
    rows: list[list[int]] = [[] for _ in range(len(prompts) * options.num_return_sequences)]
    for event in decode(model, prompts, options, eos_ids=eos_ids, cancel=CancelToken(), **more):
        if isinstance(event, Tokens):
            for row, token in zip(rows, event.ids, strict=True):
                if token is not None:
                    row.append(token)
    return rows


def theirs(
    model: torch.nn.Module, ids: Sequence[int], options: GenerateOptions, eos_ids: frozenset[int] = EOS_IDS
) -> list[int]:
    """The same prompt, alone, through transformers."""
    out = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        use_cache=options.use_cache,
        repetition_penalty=options.repetition_penalty,
        eos_token_id=sorted(eos_ids),
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("penalty", [1.0, 1.3], ids=["plain", "penalty"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_token_for_token_that_of_transformers_alone_and_in_a_batch(
    name: str, penalty: float, use_cache: bool
) -> None:
    options = replace(GREEDY, repetition_penalty=penalty, use_cache=use_cache)
    prompts = [prompt(9, 1), prompt(2 * WINDOW + 5, 2), prompt(1, 3), prompt(9, 4)]
    expected = [theirs(toy(name), ids, options) for ids in prompts]
    assert [ours(toy(name), [ids], options)[0] for ids in prompts] == expected
    assert ours(toy(name), prompts, options) == expected
    assert len({tuple(row) for row in expected}) == len(prompts)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_read_in_chunks_gives_the_same_tokens(name: str) -> None:
    options = replace(GREEDY, prefill_chunk=16)
    prompts = [prompt(100, 5), prompt(37, 6)]
    expected = [theirs(toy(name), ids, options) for ids in prompts]
    assert ours(toy(name), prompts[:1], options) == expected[:1]
    assert ours(toy(name), prompts, options) == expected


def test_steps_count_the_prompt_as_it_is_read() -> None:
    options = replace(GREEDY, prefill_chunk=16, max_new_tokens=1)
    events = list(decode(toy("llama"), [prompt(40)], options, eos_ids=EOS_IDS, cancel=CancelToken()))
    assert [event.done for event in events if isinstance(event, Step)] == [0, 16, 32, 40]
    assert {event.total for event in events if isinstance(event, Step)} == {40}
    assert isinstance(events[-1], Tokens)


def _eos_midway(prompts: Sequence[Sequence[int]]) -> frozenset[int]:
    """A token that ends the first answer early."""
    return frozenset({ours(toy("llama"), prompts[:1], GREEDY, eos_ids=frozenset())[0][4]})


def test_rows_end_at_eos_and_the_others_go_on_undisturbed() -> None:
    prompts = [prompt(12, seed) for seed in range(3)] + [prompt(5, 9)]
    eos_ids = _eos_midway(prompts)
    rows = ours(toy("llama"), prompts, GREEDY, eos_ids=eos_ids)
    assert rows == [theirs(toy("llama"), ids, GREEDY, eos_ids) for ids in prompts]
    assert len(rows[0]) <= 5 < max(map(len, rows))


def test_ended_rows_are_no_longer_computed() -> None:
    prompts = [prompt(12, seed) for seed in range(3)]
    model, sizes = fresh("llama"), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: sizes.append(inputs["input_ids"].shape[0]), with_kwargs=True)
    ended: set[int] = set()
    rows: list[list[int]] = [[], [], []]
    for event in decode(model, prompts, GREEDY, eos_ids=frozenset(), cancel=CancelToken(), ended=ended):
        if isinstance(event, Tokens):
            for row, token in zip(rows, event.ids, strict=True):
                row.extend([] if token is None else [token])
            ended.update({1} if len(rows[0]) == 3 else ())
    assert [len(row) for row in rows] == [20, 3, 20]
    assert rows[2] == theirs(toy("llama"), prompts[2], GREEDY, frozenset())
    assert sizes == [3] * 3 + [2] * 17


def test_decoding_stops_when_the_last_row_ends() -> None:
    prompts = [prompt(12, 0)]
    eos_ids = _eos_midway(prompts)
    assert ours(toy("llama"), prompts, replace(GREEDY, max_new_tokens=400), eos_ids=eos_ids)[0][-1] in eos_ids


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_answers_to_one_prompt_equal_separate_runs_with_successive_seeds(name: str, use_cache: bool) -> None:
    options = GenerateOptions(max_new_tokens=12, temperature=1.5, seed=7, num_return_sequences=3, use_cache=use_cache)
    together = ours(toy(name), [prompt(20)], options)
    alone = [ours(toy(name), [prompt(20)], replace(options, num_return_sequences=1, seed=7 + i))[0] for i in range(3)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 3


def test_the_prompt_is_processed_once_for_all_answers() -> None:
    model, shapes = fresh("llama"), []
    model.register_forward_pre_hook(
        lambda _m, _a, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    ours(model, [prompt(20)], GenerateOptions(max_new_tokens=3, num_return_sequences=4, seed=1), eos_ids=frozenset())
    assert shapes == [(1, 20), (4, 1), (4, 1)]


def test_several_answers_to_several_prompts_of_unequal_length() -> None:
    options = GenerateOptions(max_new_tokens=10, seed=3, num_return_sequences=2)
    prompts = [prompt(4, 1), prompt(30, 2)]
    together = ours(toy("llama"), prompts, options)
    alone = ours(toy("llama"), prompts[:1], options) + ours(toy("llama"), prompts[1:], options, seeds=[5, 6])
    assert together == alone


def test_a_seed_repeats_and_minus_one_does_not() -> None:
    options = GenerateOptions(max_new_tokens=16, temperature=2.0, seed=11)
    assert ours(toy("llama"), [prompt(8)], options) == ours(toy("llama"), [prompt(8)], options)
    drawn = replace(options, seed=-1)
    assert ours(toy("llama"), [prompt(8)], drawn) != ours(toy("llama"), [prompt(8)], drawn)


def test_without_padding_the_model_gets_no_mask() -> None:
    model, masks = fresh("llama"), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True)
    ours(model, [prompt(8, 1), prompt(8, 2)], GREEDY)
    assert set(masks) == {None}


def test_int8_cache_stays_close_to_the_exact_one() -> None:
    exact = ours(toy("llama"), [prompt(60), prompt(20, 1)], GREEDY)
    rounded = ours(toy("llama"), [prompt(60), prompt(20, 1)], replace(GREEDY, cache_type="int8"))
    same = [a == b for row, other in zip(exact, rounded, strict=True) for a, b in zip(row, other, strict=False)]
    assert sum(same) / len(same) > 0.8


class _Slow:
    """Makes every block of a model take its time, as on a slow machine."""

    def __init__(self, model: torch.nn.Module, seconds: float) -> None:
        for block in decoder_blocks(model):
            for part in (block.self_attn, block.mlp):
                part.register_forward_pre_hook(lambda *_: time.sleep(seconds))


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_stop_works_within_a_second(when: str) -> None:
    model, cancel = fresh("llama"), CancelToken()
    _Slow(model, 0.4)  # a forward pass takes 1.6 s
    events = decode(model, [prompt(8)], GREEDY, eos_ids=EOS_IDS, cancel=cancel)
    for event in events:
        if (when == "reading" and isinstance(event, Step)) or isinstance(event, Tokens):
            break
    pressed: list[float] = []
    timer = threading.Timer(0.2, lambda: (pressed.append(time.perf_counter()), cancel.set()))
    timer.start()
    with pytest.raises(Cancelled):
        next(events)
    assert time.perf_counter() - pressed[0] < 1.0


def test_hooks_are_gone_after_every_end() -> None:
    model = fresh("llama")
    ours(model, [prompt(4)], GREEDY)
    events = decode(model, [prompt(4)], GREEDY, eos_ids=EOS_IDS, cancel=CancelToken())
    next(events)
    assert any(module._forward_pre_hooks for module in model.modules())
    events.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inference_mode_does_not_leak_to_the_caller() -> None:
    events = decode(toy("llama"), [prompt(4)], GREEDY, eos_ids=EOS_IDS, cancel=CancelToken())
    next(events)
    assert not torch.is_inference_mode_enabled()
    events.close()


def test_check_runs_before_every_forward_pass_and_may_refuse() -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OutOfMemory("The budget is reached.")

    options = replace(GREEDY, prefill_chunk=16)
    with pytest.raises(OutOfMemory):
        ours(toy("llama"), [prompt(40)], options, check=check)
    assert len(calls) == 5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("greedy", [True, False])
def test_numbers_that_are_not_numbers_are_named_with_the_token(poison: float, greedy: bool) -> None:
    model, calls = fresh("llama"), []

    def spoil(_module: torch.nn.Module, _inputs: object, logits: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return logits.index_fill(-1, torch.tensor([7]), poison) if len(calls) == 3 else None

    model.lm_head.register_forward_hook(spoil)
    with pytest.raises(CorruptModel, match="at token 3") as caught:
        ours(model, [prompt(8)], replace(GREEDY, greedy=greedy))
    assert "fp32" in caught.value.hint


def test_nan_weights_are_a_corrupt_model() -> None:
    model = fresh("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CorruptModel, match="at token 1"):
        ours(model, [prompt(8)], GREEDY)


def test_minus_infinity_is_a_legitimate_logit() -> None:
    model = fresh("llama")
    model.lm_head.register_forward_hook(
        lambda _m, _i, logits: logits.index_fill(-1, torch.arange(1, 260), float("-inf"))
    )
    assert ours(model, [prompt(8)], replace(GREEDY, greedy=False, max_new_tokens=3)) == [[0, 0, 0]]


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_an_empty_prompt_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="empty"):
        ours(toy("llama"), prompts, GREEDY)


def test_a_foreign_tokenizer_is_named() -> None:
    with pytest.raises(BadInput, match=r"token 50,000.*only 260"):
        ours(toy("llama"), [[1, 50_000]], GREEDY)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_tokens_of_the_cpu(name: str, kv: str) -> None:
    prompts = [prompt(2 * WINDOW, 1), prompt(5, 2), prompt(40, 3)]
    for options in (GREEDY, GenerateOptions(max_new_tokens=12, seed=4, num_return_sequences=2, repetition_penalty=1.2)):
        options = replace(options, cache_type=kv, prefill_chunk=16)
        assert ours(fresh(name).cuda(), prompts, options) == ours(toy(name), prompts, options)


@pytest.mark.real
@pytest.mark.usefixtures("demo_home")
def test_the_demo_model_answers_as_under_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowmem.models.source import local_folder

    folder = local_folder("demo")
    if folder is None:
        pytest.skip("the demo model has not been fetched")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is", "Once upon a time, in a small village by the sea,", "def fibonacci(n):"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    options = replace(GREEDY, max_new_tokens=32)
    eos_ids = frozenset({tokenizer.eos_token_id})
    assert ours(model, prompts, options, eos_ids=eos_ids) == [theirs(model, ids, options, eos_ids) for ids in prompts]
