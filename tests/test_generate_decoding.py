"""The decode loop against `transformers.generate`, token for token, and what interrupts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import toys
import transformers
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


# --- generation_config.json


RULES: dict[str, dict[str, object]] = {
    "suppressed": {"suppress_tokens": "first and fourth"},
    "suppressed at first": {"begin_suppress_tokens": "first and fourth"},
    "bad words": {"bad_words_ids": "words"},
    "penalty": {"repetition_penalty": 1.5},
    "no token twice": {"no_repeat_ngram_size": 1},
    "pairs, penalty, bad words": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "bad_words_ids": "words"},
    "at least so long": {"min_new_tokens": 9, "eos_token_id": "third"},
    "at least so long with the prompt": {"min_length": 25, "eos_token_id": "third"},
    "ends": {"forced_eos_token_id": 7},
    "begins": {"forced_bos_token_id": 5},
    "biased": {"sequence_bias": [[[3], 4.0], [[1, 2], -3.0]], "repetition_penalty": 1.2},
    "ends sooner": {"exponential_decay_length_penalty": [2, 1.5]},
}


def _filled(rule: dict[str, object], answer: Sequence[int]) -> dict[str, object]:
    """The rule with tokens of the answer that the model gives without it."""
    words = {
        "first and fourth": [answer[0], answer[3]], "words": [[answer[1]], [answer[4], answer[5]]],
        "third": [EOS, answer[2]],
    }  # fmt: skip
    return {key: words[value] if isinstance(value, str) else value for key, value in rule.items()}


@pytest.mark.parametrize("rule", RULES)
def test_the_generation_config_is_followed_as_transformers_does(rule: str) -> None:
    model = fresh("llama")
    prompts = [prompt(12, 21), prompt(5, 22), prompt(1, 23)]
    plain = [ours(model, [ids], GREEDY)[0] for ids in prompts]
    model.generation_config = transformers.GenerationConfig(
        **{"eos_token_id": EOS, "pad_token_id": 0} | _filled(RULES[rule], plain[0])
    )
    eos = model.generation_config.eos_token_id
    ends = frozenset(eos if isinstance(eos, list) else [eos])
    expected = [
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=20, do_sample=False)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    assert [ours(model, [ids], GREEDY, eos_ids=ends)[0] for ids in prompts] == expected
    assert ours(model, prompts, GREEDY, eos_ids=ends) == expected
    looked_up = replace(GREEDY, prompt_lookup_num_tokens=8)
    assert [ours(model, [ids], looked_up, eos_ids=ends)[0] for ids in prompts] == expected
    assert expected != plain


def test_what_a_person_chooses_wins_over_the_generation_config() -> None:
    model, ids = fresh("llama"), prompt(12, 21)
    plain = ours(model, [ids], GREEDY)
    model.generation_config.repetition_penalty = 1.5
    assert ours(model, [ids], GREEDY) != plain
    assert ours(model, [ids], replace(GREEDY, repetition_penalty=1.0)) == plain


def test_a_damaged_rule_is_ignored() -> None:
    model, ids = fresh("llama"), prompt(12, 21)
    plain = ours(model, [ids], GREEDY)
    damaged = {
        "bad_words_ids": [[10**6]], "suppress_tokens": "x", "no_repeat_ngram_size": "2", "min_length": [1],
        "sequence_bias": 3, "exponential_decay_length_penalty": 7, "forced_eos_token_id": -4, "temperature": "hot",
        "repetition_penalty": float("nan"),
    }  # fmt: skip
    for name, value in damaged.items():
        setattr(model.generation_config, name, value)
    assert ours(model, [ids], GREEDY) == plain


# --- frequencies of rotary positions that depend on the length


LENGTH = 32
"""Original context of the toys."""


def growing(kind: str) -> transformers.PreTrainedModel:
    factors = [1.0 + number / 2 for number in range(8)]
    rope = {
        "rope_type": kind, "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": factors, "factor": 8.0,
        "original_max_position_embeddings": LENGTH,
    }  # fmt: skip
    config = toys.config("phi3" if kind == "longrope" else "llama")
    config.original_max_position_embeddings = LENGTH
    config.max_position_embeddings = LENGTH if kind == "dynamic" else 8 * LENGTH
    config.rope_parameters = rope
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(toy(config.model_type).state_dict())
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_beyond_the_original_context_are_rotated_as_a_whole(kind: str, use_cache: bool) -> None:
    """In parts, beside shorter and longer texts, and where an answer passes the original context."""
    model = growing(kind)
    options = replace(GREEDY, max_new_tokens=24, prefill_chunk=16, use_cache=use_cache)
    prompts = [prompt(75, 31), prompt(9, 32), prompt(LENGTH - 6, 33), prompt(LENGTH, 34), prompt(LENGTH + 1, 35)]
    whole = [theirs(growing(kind), ids, options) for ids in prompts]
    assert [ours(model, [ids], options)[0] for ids in prompts] == whole
    assert ours(model, prompts, options) == whole
    twice = ours(model, prompts[2:3], replace(options, num_return_sequences=2))
    assert twice == [whole[2]] * 2
    assert ours(model, prompts[2:3], replace(options, prompt_lookup_num_tokens=4)) == whole[2:3]
