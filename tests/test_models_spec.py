"""Shapes from configuration, exact inventories, and the catalog against published numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lowmem.errors import CorruptModel, LowMemError, UnsafeModel, Unsupported
from lowmem.models import derive as derive_module
from lowmem.models.anatomy import Anatomy
from lowmem.models.catalog import CATALOG, find, synthetic
from lowmem.models.derive import derive
from lowmem.models.spec import ModelSource, ModelSpec, Tensor
from lowmem.planning.placement import read_per_token

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.label)
def test_catalog_inventory_sums_to_the_published_parameters(entry) -> None:
    assert entry.spec().parameters == pytest.approx(entry.parameters, rel=0.001)


@pytest.mark.parametrize(
    ("ref", "size"),
    [
        # Bytes of the weight files as the hub lists them; headers are up to 100 KB each.
        ("openai-community/gpt2", 548_105_171),
        ("distilgpt2", 352_833_716),
        ("gpt2-medium", 1_519_984_962),
        ("Qwen/Qwen3-0.6B", 1_503_300_328),
        ("Qwen/Qwen2.5-0.5B-Instruct", 988_097_824),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 2_200_119_864),
    ],
)
def test_catalog_bytes_are_those_of_the_published_files(ref: str, size: int) -> None:
    assert 0 <= size - find(ref).spec().size_on_disk < 100_000


@pytest.mark.parametrize(
    ("ref", "parameters", "digits"),
    [
        # Of all files, as the hub and evaluations list them, to as many digits as they give: what sees, hears and
        # predicts several tokens included.
        ("Qwen/Qwen3.5-0.8B", 0.87e9, 2),
        ("Qwen/Qwen3.5-4B", 4.66e9, 3),
        ("Qwen/Qwen3.5-9B", 9.65e9, 3),
        ("Qwen/Qwen3.6-35B-A3B", 36e9, 2),
        ("Qwen/Qwen3.8-27B", 27_781_427_952, 11),
        ("LiquidAI/LFM2.5-1.2B-Instruct", 1.17e9, 3),
        ("LiquidAI/LFM2.5-8B-A1B", 8.47e9, 3),
        ("google/gemma-4-E2B-it", 5.1e9, 2),
        ("google/gemma-4-E4B-it", 8.0e9, 2),
        ("google/gemma-4-12B-it", 11.95e9, 4),
        ("mistralai/Ministral-3-3B-Instruct-2512-BF16", 3.85e9, 3),
        ("ibm-granite/granite-4.1-8b", 8.79e9, 3),
    ],
)
def test_files_of_2026_hold_the_published_parameters(ref: str, parameters: float, digits: int) -> None:
    held = find(ref).spec().size_on_disk / 2
    assert f"{held:.{digits - 1}e}" == f"{parameters:.{digits - 1}e}"


def test_gpt_oss_is_stored_in_mxfp4() -> None:
    """Of a weight of an expert 4 bits and 1/32 of a byte; of everything else 16 bits."""
    spec = find("openai/gpt-oss-20b").spec()
    experts = [tensor for tensor in spec.tensors if tensor.role == "experts" and len(tensor.shape) == 3]
    packed = sum(tensor.elements for tensor in experts)
    assert spec.size_on_disk == packed // 2 + packed // 32 + 2 * (spec.parameters - packed)
    assert spec.parameters == 20_914_757_184


@pytest.mark.parametrize(
    ("ref", "experts", "per_token", "active"),
    [
        ("openai/gpt-oss-20b", 32, 4, 3.6e9),
        ("google/gemma-4-26B-A4B-it", 128, 8, 3.8e9),
        ("Qwen/Qwen3.6-35B-A3B", 256, 8, 3e9),
        ("LiquidAI/LFM2.5-8B-A1B", 32, 4, 1.5e9),
    ],
)
def test_a_token_reads_the_chosen_experts_of_a_mixture(ref: str, experts: int, per_token: int, active: float) -> None:
    spec = find(ref).spec()
    assert (spec.experts, spec.experts_per_token) == (experts, per_token)
    read = sum(share * tensor.elements for tensor, share in read_per_token(spec))
    assert read == pytest.approx(active, rel=0.15)  # some are published without the output head


def test_the_memory_of_a_pass_does_not_grow_with_the_experts() -> None:
    """An expert's matrix is a view of the parameter that holds all, which takes no memory."""
    config = {**LLAMA, "model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    few, many = (derived({**config, "num_experts": count}) for count in (8, 512))
    constant = [max(term[3] for term in dict(found.activations)["half"].first) for found in (few, many)]
    assert constant[1] == pytest.approx(constant[0], abs=1000)


def test_of_embeddings_for_every_layer_a_token_reads_a_row() -> None:
    """The effective parameters of Gemma 4 E2B are 2.3e9 of 4.6e9 (its model card)."""
    spec = find("google/gemma-4-E2B-it").spec()
    assert sum(share * tensor.elements for tensor, share in read_per_token(spec)) == pytest.approx(2.3e9, rel=0.02)


def test_a_description_that_is_not_verified_says_so() -> None:
    assert "not yet checked" in find("google/gemma-4-12B-it").spec().source.caution
    assert find("Qwen/Qwen3.5-4B").spec().source.caution == ""


def test_a_rank_without_a_source_is_below_those_with_one() -> None:
    """Of models with as many parameters or fewer that chat."""
    ranked = [entry for entry in CATALOG if entry.rank_source and entry.chat]
    for entry in CATALOG:
        peers = [other.quality for other in ranked if 0.8 < other.parameters / entry.parameters < 1.25]
        assert entry.rank_source or entry.quality < min(peers, default=100)


def test_catalog_names_are_unique_and_every_field_is_set() -> None:
    assert len({entry.ref for entry in CATALOG}) == len({entry.label for entry in CATALOG}) == len(CATALOG)
    for entry in CATALOG:
        assert entry.licence
        assert 0 < entry.quality <= 100
        assert entry.use in ("chat", "completion")
        spec = entry.spec()
        assert (spec.gated, spec.licence, spec.has_chat_template) == (entry.gated, entry.licence, entry.chat)
        assert spec.parameters < 35e9


def test_quality_grows_with_size_within_a_family() -> None:
    for family in ("SmolLM2", "Qwen3-", "Qwen3.5", "LFM2.5", "gemma-4", "granite", "Llama-3.2", "gpt2"):
        members = sorted((e for e in CATALOG if e.label.startswith(family)), key=lambda e: e.parameters)
        assert len(members) > 1
        assert [e.quality for e in members] == sorted(e.quality for e in members)


def test_kv_cache_of_known_models() -> None:
    assert find("demo").spec().kv_bytes_per_token("fp32") == 2 * 30 * 3 * 64 * 4
    gemma = find("google/gemma-3-1b-it").spec()
    assert gemma.layer_types.count("full") == 4
    per_layer = 2 * 1 * 256 * 2
    assert gemma.kv_bytes(4096, 1, "bf16") == per_layer * (4 * 4096 + 22 * 512)
    assert find("google/gemma-2-2b-it").spec().layer_types[:2] == ("sliding", "full")


def test_synthetic_shapes() -> None:
    spec = synthetic(layers=32, hidden=4096, intermediate=11_008, heads=32)
    assert spec.parameters == 6_738_415_616
    assert spec.size_on_disk == 2 * spec.parameters
    wide = synthetic(layers=1, hidden=8, intermediate=8, heads=2, kv_heads=1, head_dim=16, vocab=10, tied=True)
    assert (wide.head_dim, wide.tied) == (16, True)
    assert {t.name: t.shape for t in wide.tensors}["model.layers.0.self_attn.q_proj.weight"] == (32, 8)


def derived(config: dict) -> Anatomy:
    return derive(config, "acme/toy", None, "bf16")


def test_gpt2_names_and_defaults() -> None:
    config = {
        "model_type": "gpt2",
        "n_layer": 2,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 257,
    }
    shape = derived(config)
    assert (shape.layers, shape.hidden, shape.heads) == (2, 768, 12)
    assert (shape.kv_heads, shape.head_dim, shape.context, shape.tied) == (12, 64, 1024, True)
    up = next(tensor for tensor in shape.tensors if tensor.name.endswith("0.mlp.c_fc.weight"))
    assert (up.shape, up.matrices, up.role) == ((768, 3072), (1, 3072, 768), "linear")


def test_of_a_model_that_sees_the_text_half_counts() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "sliding_window": 1024,
    }
    shape = derived({"model_type": "gemma3", "text_config": text})
    assert (shape.model_type, shape.heads, shape.kv_heads, shape.head_dim) == ("gemma3_text", 8, 4, 256)
    assert (shape.vocab, shape.context, shape.tied) == (262_208, 131_072, True)
    assert [cache.window for cache in shape.caches] == [1024] * 5 + [0]
    assert not any("vision" in tensor.name for tensor in shape.tensors)


@pytest.mark.parametrize(
    ("change", "types", "window"),
    [
        ({}, "ffff", 0),
        ({"model_type": "mistral", "sliding_window": 128}, "ssss", 128),
        ({"model_type": "mistral", "sliding_window": None}, "ffff", 0),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": False}, "ffff", 0),
        (
            {"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3},
            "fffs",
            128,
        ),
        ({"model_type": "gemma2", "sliding_window": 128}, "sfsf", 128),
        ({"model_type": "gemma3_text", "sliding_window": 128, "sliding_window_pattern": 3}, "ssfs", 128),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}, "cfcf", 0),
    ],
)
def test_layers_cache_what_their_type_says(change: dict, types: str, window: int) -> None:
    shape = derived(LLAMA | change)
    kinds = {"full": "f", "sliding": "s", "state": "c"}
    assert "".join(kinds[cache.kind] for cache in shape.caches) == types
    assert max(cache.window for cache in shape.caches) == window


def test_a_recurrent_layer_takes_the_same_at_every_length() -> None:
    config = {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100, "state_size": 8}
    spec = ModelSpec(ModelSource("r", "n"), **derived(config).shape())
    # The inner width is twice the hidden size; 4 inputs of the convolution, and a state in fp32.
    assert spec.kv_bytes(10, 3, "bf16") == spec.kv_bytes(10_000, 3, "bf16") == 3 * 2 * 128 * (4 * 2 + 8 * 4)
    assert spec.kv_bytes_per_token("bf16") == 0


def test_experts_are_stacked_and_a_token_reads_some_of_them() -> None:
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = derived(config)
    assert (shape.experts, shape.experts_per_token) == (8, 2)
    stacked = next(tensor for tensor in shape.tensors if tensor.role == "experts")
    assert (stacked.shape, stacked.matrices) == ((8, 256, 64), (8, 256, 64))
    spec = ModelSpec(ModelSource("r", "n"), **shape.shape())
    assert {share for tensor, share in read_per_token(spec) if tensor.role == "experts"} == {0.25}


def test_activations_are_those_of_the_operations() -> None:
    """Of a Llama over T tokens: gate, its activation, up and their product, beside the residual and its norm."""
    shape = derived(LLAMA | {"intermediate_size": 1024})
    per_token = dict(shape.activations)["fp32"].bytes(1000, 1000, 1) / 1000 / 4
    assert 3 * 1024 + 64 <= per_token <= 4 * 1024 + 4 * 64
    spec = ModelSpec(ModelSource("r", "n"), **shape.shape())
    assert spec.activation_bytes(1000, 1000, 3, "fp32") == 3 * spec.activation_bytes(1000, 1000, 1, "fp32")
    assert spec.activation_bytes(100, 4000, 1, "fp32") > spec.activation_bytes(100, 100, 1, "fp32")


def test_what_was_derived_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLAMA | {"vocab_size": 123}
    first = derived(config)
    monkeypatch.setattr(derive_module, "_derived_here", {})
    monkeypatch.setattr(derive_module, "_derived", lambda *_: pytest.fail("derived again"))
    assert derived(config) == first


def test_without_torch_a_child_process_derives() -> None:
    code = """
import sys
from lowmem.models.derive import derive
anatomy = derive({config!r}, "acme/toy", None, "bf16")
assert "torch" not in sys.modules
print(anatomy.layers, anatomy.caches[0].heads)
try:
    derive({{"model_type": "t5"}}, "acme/toy", None, "bf16")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code.format(config=LLAMA)], capture_output=True, text=True, check=True)
    shape, refusal = done.stdout.splitlines()
    assert shape == "4 2"
    assert refusal.startswith("Unsupported acme/toy is an encoder-decoder (t5)")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("value", [None, -1, "many", 1.5, 10**400])
def test_bad_config_names_the_key(key: str, value: object) -> None:
    with pytest.raises(CorruptModel, match=key):
        derived(LLAMA | {key: value})


def test_more_layers_than_tensors_are_refused_before_they_are_built() -> None:
    with pytest.raises(CorruptModel, match="1,000,000 layers"):
        derive(LLAMA | {"num_hidden_layers": 1_000_000}, "toy", [Tensor("a", "fp32", (1,), 4)])


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"model_type": "weird", "auto_map": {"AutoModelForCausalLM": "x.py"}}, UnsafeModel, "weird"),
        ({"model_type": "t5"}, Unsupported, "encoder-decoder"),
        ({"model_type": "clip"}, Unsupported, "does not generate text"),
        ({"model_type": "whisper"}, Unsupported, "encoder-decoder"),
        ({"model_type": "perceptron"}, Unsupported, "does not know"),
        ({}, CorruptModel, "model_type"),
    ],
)
def test_refused_architectures(config: dict, kind: type[LowMemError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        derived(config)
    assert "acme/toy" in caught.value.message
    assert caught.value.hint


def test_own_code_of_a_known_family_is_ignored_not_refused() -> None:
    assert derived(LLAMA | {"auto_map": {"AutoModelForCausalLM": "x.py"}}).layers == 4
