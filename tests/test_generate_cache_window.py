"""Endless streams against a naive reference: full attention over un-rotated keys, with an explicit mask and explicit distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from toys import VOCABULARY, config, prompt, toy
from transformers import DynamicCache

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Step
from lowmem.generate.cache import policy
from lowmem.generate.cache.rotary import key_rotations, paired_rotation
from lowmem.generate.cache.window import WindowCache
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions

GREEDY = GenerateOptions(max_new_tokens=40, greedy=True)
ROTARY = ("llama", "qwen2", "qwen3", "gemma", "phi", "phi3")


def ours(model: Any, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(len(prompts) * options.num_return_sequences)]
    for event in decode(model, prompts, options, eos_ids=frozenset(), cancel=CancelToken()):
        if isinstance(event, Tokens):
            for text, token in zip(texts, event.ids, strict=True):
                text.append(token)
    return texts


def windowed_logits(model: Any, ids: Sequence[Sequence[int]], options: GenerateOptions, chunk: int) -> torch.Tensor:
    """Logits after every token, read through a window cache `chunk` tokens at a time."""
    pads = [max(map(len, ids)) - len(row) for row in ids]
    padded = torch.tensor([[0] * pad + list(row) for row, pad in zip(ids, pads, strict=True)])
    cache = policy.make_cache(model, options, rows=len(ids), capacity=0, pads=pads)
    start, found = 0, []
    with torch.inference_mode():
        for tokens in cache.parts(padded.shape[1], chunk):
            inputs = cache.inputs(tokens, model.device, model.dtype)
            part = padded[:, start : start + tokens]
            found.append(model(input_ids=part, past_key_values=cache, use_cache=True, **inputs).logits)
            start += tokens
    return torch.cat(found, dim=1)


class NaiveLlama:
    """Llama token by token as StreamingLLM describes it: keys kept un-rotated, all of them turned anew every time."""

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        self.model, self.sinks, self.window = model, sinks, window
        self.keys: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
        self.values: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def turned(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None].double() * self.model.model.rotary_emb.inv_freq.double()
        cos, sin = angles.cos().repeat(1, 2).float(), angles.sin().repeat(1, 2).float()
        half = states.shape[-1] // 2
        return states * cos + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sin

    @torch.inference_mode()
    def __call__(self, token: int) -> torch.Tensor:
        hidden = self.model.model.embed_tokens(torch.tensor([token]))
        for index, layer in enumerate(self.model.model.layers):
            hidden = hidden + self.attention(index, layer.self_attn, layer.input_layernorm(hidden))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden))[0]

    def attention(self, index: int, attention: Any, hidden: torch.Tensor) -> torch.Tensor:
        width = attention.head_dim
        query, key, value = (p(hidden).view(-1, width) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        keys, values = self.keys[index], self.values[index]
        keys.append(key), values.append(value)
        if len(keys) > self.sinks + self.window:
            del keys[self.sinks], values[self.sinks]
        places = torch.arange(len(keys))
        turned = torch.stack([self.turned(key, place[None]) for key, place in zip(keys, places, strict=True)])
        query = self.turned(query, places[-1:])
        repeats = len(query) // len(key)
        turned, seen = (states.repeat_interleave(repeats, dim=1) for states in (turned, torch.stack(values)))
        weights = (torch.einsum("hd,thd->ht", query, turned) / math.sqrt(width)).softmax(dim=-1)
        return attention.o_proj(torch.einsum("ht,thd->hd", weights, seen).reshape(1, -1))


@pytest.mark.parametrize(("sinks", "window"), [(4, 24), (0, 24), (1, 7)])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_equal_to_the_unrotated_reference_in_chunks_of_any_size(sinks: int, window: int, chunk: int) -> None:
    model, ids = toy("llama"), prompt(150)
    naive = NaiveLlama(model, sinks, window)
    expected = torch.stack([naive(token) for token in ids])
    got = windowed_logits(model, [ids], replace(GREEDY, sinks=sinks, window=window), chunk)[0]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_identical_to_the_full_cache_before_anything_is_forgotten(name: str) -> None:
    model, ids = toy(name), torch.tensor([prompt(40)])
    options = replace(GREEDY, sinks=4, window=60)
    got = windowed_logits(model, ids.tolist(), options, 16)
    cache, expected = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for part in ids.split([16, 16, 8], dim=1):
            expected.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert torch.equal(got, torch.cat(expected, dim=1))


@pytest.mark.parametrize("name", [*ROTARY, "gemma3", "mistral"])
def test_chunks_and_single_tokens_agree_for_every_family(name: str) -> None:
    model, ids, options = toy(name), prompt(120), replace(GREEDY, sinks=3, window=20)
    one, many = (windowed_logits(model, [ids], options, chunk) for chunk in (1, 32))
    torch.testing.assert_close(one, many, atol=5e-4, rtol=1e-3)


def test_positions_come_back_long_before_the_limit_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, options = toy("llama"), prompt(400), replace(GREEDY, sinks=4, window=24)
    expected = windowed_logits(model, [ids], options, 1)
    monkeypatch.setattr(policy, "position_limit", lambda _config: 40)
    for chunk in (1, 12):
        got = windowed_logits(model, [ids], options, chunk)
        torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-3)


def test_native_sliding_layers_remember_their_own_window() -> None:
    model, ids = toy("mistral"), torch.tensor([prompt(100)])
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
    got = windowed_logits(model, ids.tolist(), replace(GREEDY, sinks=4, window=64), 8)
    torch.testing.assert_close(got, expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_each_row_of_a_batch_gets_what_it_would_get_alone(name: str) -> None:
    prompts = [prompt(50), prompt(3, 1), prompt(21, 2)]
    cached = replace(GREEDY, sinks=4, window=24, prefill_chunk=16)
    for options in (cached, replace(cached, use_cache=False)):
        together = ours(toy(name), prompts, options)
        assert together == [ours(toy(name), [one], options)[0] for one in prompts]


def test_answers_to_one_prompt_are_those_of_separate_runs() -> None:
    options = GenerateOptions(max_new_tokens=40, sinks=2, window=16, num_return_sequences=2, seed=3)
    both = ours(toy("llama"), [prompt(30)], options)
    alone = [
        ours(toy("llama"), [prompt(30)], replace(options, num_return_sequences=1, seed=seed))[0] for seed in (3, 4)
    ]
    assert both == alone


def test_the_window_computed_anew_is_what_a_model_without_cache_sees() -> None:
    model, ids, options = toy("gpt2"), prompt(20), replace(GREEDY, window=16, sinks=0, use_cache=False)
    text = list(ids)
    for token in ours(model, [ids], options)[0]:
        with torch.inference_mode():
            assert int(model(input_ids=torch.tensor([text[-16:]])).logits[0, -1].argmax()) == token
        text.append(token)


def test_learned_positions_are_recomputed_in_blocks_and_go_beyond_the_context() -> None:
    model = toy("gpt2")
    options = replace(GREEDY, window=32, max_new_tokens=600)
    ids = prompt(40)
    text, begin = list(ids), len(ids) - 32
    for token in ours(model, [ids], options)[0]:
        if len(text) - begin > 32:
            begin = len(text) - 24
        with torch.inference_mode():
            assert int(model(input_ids=torch.tensor([text[begin:]])).logits[0, -1].argmax()) == token
        text.append(token)


def test_memory_does_not_grow() -> None:
    model, options = toy("llama"), replace(GREEDY, sinks=4, window=28)
    cache = policy.make_cache(model, options, rows=1, capacity=0, pads=[0])
    assert isinstance(cache, WindowCache)
    pointers = set()
    with torch.inference_mode():
        for token in prompt(100):
            cache.inputs(1, model.device, model.dtype)
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            pointers.add(cache.layers[0].keys.data_ptr())
    assert len(pointers) == 1
    assert cache.layers[0].keys.numel() == 2 * 32 * 16


def test_text_that_left_the_window_does_not_pile_up() -> None:
    options = replace(GREEDY, sinks=4, window=16, max_new_tokens=300, repetition_penalty=1.3)
    first, second = (ours(toy("llama"), [prompt(30)], replace(options, max_new_tokens=n))[0] for n in (300, 90))
    assert first[:90] == second


def test_transformers_generate_takes_the_cache() -> None:
    model, options = toy("llama"), replace(GREEDY, sinks=4, window=24)
    ids = prompt(20)
    cache = policy.make_cache(model, options, rows=1, capacity=0, pads=[0])
    theirs = model.generate(
        torch.tensor([ids]), past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=-1
    )
    assert theirs[0, 20:].tolist() == ours(model, [ids], options)[0]


PARTIAL = {"partial_rotary_factor": 0.5, "rope_type": "default", "rope_theta": 10000.0}
SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 4.0},
}
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "intermediate_size": 96,
    "pad_token_id": 0,
}


def other(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, kind)(**{**_SMALL, **changes})
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotations_are_recognized(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]}
    model = other("LlamaConfig", num_key_value_heads=2, rope_parameters=rope)
    _check_turns(model)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GPTJConfig", {"rotary_dim": 8, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
        ("GPTNeoXConfig", {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}}),
        ("CohereConfig", {"num_key_value_heads": 2}),
        ("GlmConfig", {"num_key_value_heads": 2, "head_dim": 16, "rope_parameters": PARTIAL}),
        ("StableLmConfig", {"num_key_value_heads": 4, "rope_parameters": PARTIAL}),
        ("SmolLM3Config", {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "use_sliding_window": False}),
        ("FalconConfig", {"alibi": False}),
    ],
)
def test_partial_interleaved_and_absent_rotations_are_recognized(kind: str, changes: dict[str, Any]) -> None:
    _check_turns(other(kind, **changes))


def _check_turns(model: Any) -> None:
    assert key_rotations(model) is not None
    ids, options = prompt(100), replace(GREEDY, sinks=3, window=20)
    one, many = (windowed_logits(model, [ids], options, chunk) for chunk in (1, 32))
    torch.testing.assert_close(one, many, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("BloomConfig", {"n_layer": 2, "n_head": 4}), ("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 2})],
)
def test_other_position_schemes_are_not_mistaken_for_rotations(kind: str, changes: dict[str, Any]) -> None:
    assert key_rotations(other(kind, **changes)) is None


def test_a_rotation_there_and_back_is_nothing() -> None:
    keys = torch.randn(1, 2, 5, 16)
    rotation = paired_rotation(torch.tensor([1.0, 0.1, 0.01]), 16, interleaved=True)
    there = rotation(keys, torch.tensor(1234.0, dtype=torch.float64))
    torch.testing.assert_close(rotation(there, torch.tensor(-1234.0, dtype=torch.float64)), keys)
    assert not torch.allclose(there, keys)


@pytest.mark.parametrize(
    ("window", "sinks", "message"),
    [(16, 16, "16 sinks leave no room in a window of 16 tokens."), (512, 4, "the model's 512 positions")],
)
def test_windows_that_cannot_be_are_refused(window: int, sinks: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ours(toy("llama"), [prompt(4)], replace(GREEDY, window=window, sinks=sinks))


def test_prompts_longer_than_context_and_window_are_read_in_chunks() -> None:
    steps = [
        event
        for event in decode(
            toy("llama"),
            [prompt(700)],
            replace(GREEDY, sinks=4, window=64, max_new_tokens=2, prefill_chunk=128),
            eos_ids=frozenset(),
            cancel=CancelToken(),
        )
        if isinstance(event, Step)
    ]
    assert [step.done for step in steps] == [0, 68, *range(132, 700, 64), 700]
    assert config("llama").max_position_embeddings < 700
