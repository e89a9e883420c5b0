"""Models with recurrent layers: what they can do with a cache, and states of rows that branch and end."""

from __future__ import annotations

import pytest
import torch
import transformers

from lowmem.events import CancelToken
from lowmem.generate.cache import capability, factory
from lowmem.generate.cache.capability import CacheUse, cache_use
from lowmem.generate.cache.full import FullLayer
from lowmem.generate.cache.state import HybridLayer, StateLayer
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions

MAMBA = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LFM2 = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2, "pad_token_id": 0,
}  # fmt: skip
PROMPT = [(7 * number + 3) % 60 for number in range(21)]


def toy(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_known", {})


def tokens(model: transformers.PreTrainedModel, prompts: list[list[int]], **options: object) -> list[list[int]]:
    found: list[list[int]] = []
    run = decode(
        model, prompts, GenerateOptions(greedy=True, max_new_tokens=8, **options), eos_ids=frozenset(),
        cancel=CancelToken(),
    )  # fmt: skip
    for event in run:
        if isinstance(event, Tokens):
            found = found or [[] for _ in event.ids]
            for row, token in zip(found, event.ids, strict=True):
                row.append(token)
    return found


def test_mamba_reads_a_prompt_whole_and_goes_on_token_by_token() -> None:
    model = toy(transformers.MambaConfig(**MAMBA))
    use = cache_use(model)
    assert (use.cached, use.chunks, use.states) == (True, False, True)
    assert tokens(model, [PROMPT], prefill_chunk=4) == tokens(model, [PROMPT], use_cache=False)


def test_short_convolutions_read_in_parts() -> None:
    model = toy(transformers.Lfm2Config(**LFM2))
    assert cache_use(model) == CacheUse(states=True)
    whole = tokens(model, [PROMPT], use_cache=False)
    assert tokens(model, [PROMPT], prefill_chunk=4) == whole
    assert tokens(model, [PROMPT, PROMPT[:9]], prefill_chunk=4)[0] == whole[0]


def test_plain_attention_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "_measured", lambda *_: pytest.fail("measured"))
    small = {key: value for key, value in LFM2.items() if key != "layer_types"}
    assert cache_use(toy(transformers.LlamaConfig(**small))) == CacheUse()


def test_a_model_without_a_cache_generates_without_one() -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = toy(config)
    assert not cache_use(model).cached
    assert len(tokens(model, [PROMPT])[0]) == 8


def test_states_follow_their_rows() -> None:
    layer = StateLayer()
    layer.update_conv_state(torch.arange(6.0).view(2, 1, 3))
    layer.update_recurrent_state(torch.arange(4.0).view(2, 2))
    layer.batch_repeat_interleave(2)
    assert layer.states()[0][:, 0, 0].tolist() == [0, 0, 3, 3]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert layer.states()[1].tolist() == [[2, 3], [0, 1]]


def test_a_hybrid_layer_has_both() -> None:
    layer = HybridLayer(FullLayer(rows=2, capacity=4))
    layer.update(torch.ones(2, 1, 3, 2), torch.ones(2, 1, 3, 2))
    layer.update_recurrent_state(torch.arange(4.0).view(2, 2))
    assert layer.get_seq_length() == 3
    layer.batch_select_indices(torch.tensor([1]))
    assert (layer.attention.batch, layer.states()[0].tolist()) == (1, [[2, 3]])


FALCON_H1 = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8,
}  # fmt: skip


def test_the_attention_of_a_hybrid_layer_has_a_window_and_a_quantized_cache() -> None:
    model = toy(transformers.FalconH1Config(**FALCON_H1))
    whole = tokens(model, [PROMPT])
    assert tokens(model, [PROMPT], window=40) == whole
    assert tokens(model, [PROMPT], cache_type="int8") == whole
    narrow = tokens(model, [PROMPT], window=12, unbounded=True)
    assert tokens(model, [PROMPT], window=12, unbounded=True, prefill_chunk=6) == narrow


def test_positions_are_passed_where_the_first_layer_counts_no_tokens() -> None:
    config = transformers.BambaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1, 3], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
    )  # fmt: skip
    model = toy(config)
    assert cache_use(model).cached
    assert tokens(model, [PROMPT]) == tokens(model, [PROMPT], use_cache=False)
    assert tokens(model, [PROMPT], window=40) == tokens(model, [PROMPT])


def test_a_family_with_a_cache_of_its_own_runs_without() -> None:
    config = transformers.xLSTMConfig(
        vocab_size=60, hidden_size=64, embedding_dim=64, num_hidden_layers=2, num_heads=2, num_blocks=2
    )
    model = toy(config)
    assert not cache_use(model).cached
    assert len(tokens(model, [PROMPT])[0]) == 8


def test_the_state_of_a_batch_takes_what_the_plan_says() -> None:
    from lowmem.models.derive import derive
    from lowmem.models.spec import ModelSource, ModelSpec

    config = transformers.Lfm2Config(**LFM2)
    spec = ModelSpec(ModelSource("r", "n"), **derive(config.to_dict(), "toy", None, "fp32").shape())
    model = toy(config)
    cache = factory.make_cache(config, rows=3, capacity=30)
    model(input_ids=torch.tensor([PROMPT] * 3), use_cache=True, cache=cache)
    held = [
        tensor
        for layer in cache.layers
        for tensor in (layer.states() if type(layer) is StateLayer else layer._stores())
    ]
    assert sum(tensor.nbytes for tensor in held) == spec.kv_bytes(30, 3, "fp32")
