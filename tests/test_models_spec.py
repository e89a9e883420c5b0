"""Shapes from configuration, exact inventories, and the catalog against published numbers."""

from __future__ import annotations

import pytest

from lowmem.errors import CorruptModel, LowMemError, UnsafeModel, Unsupported
from lowmem.models.catalog import CATALOG, find, synthetic
from lowmem.models.config import SUPPORTED, check_supported, read_shape
from lowmem.models.spec import ModelSource, ModelSpec, Tensor

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


def test_catalog_names_are_unique_and_every_field_is_set() -> None:
    assert len({entry.ref for entry in CATALOG}) == len({entry.label for entry in CATALOG}) == len(CATALOG)
    for entry in CATALOG:
        assert entry.licence
        assert 0 < entry.quality <= 100
        assert entry.use in ("chat", "completion", "code")
        spec = entry.spec()
        assert (spec.gated, spec.licence, spec.has_chat_template) == (entry.gated, entry.licence, entry.chat)
        assert spec.parameters < 8.5e9


def test_quality_grows_with_size_within_a_family() -> None:
    for family in ("SmolLM2", "Qwen3", "Llama-3.2", "gpt2"):
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


def test_gpt2_names_and_defaults() -> None:
    config = {
        "model_type": "gpt2",
        "n_layer": 6,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50_257,
    }
    shape = read_shape(config)
    assert (shape.layers, shape.hidden, shape.intermediate, shape.heads) == (6, 768, 3072, 12)
    assert (shape.kv_heads, shape.head_dim, shape.context, shape.tied) == (12, 64, 1024, True)


def test_nested_text_config() -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    }
    shape = read_shape({"model_type": "gemma3", "text_config": text})
    assert (shape.model_type, shape.heads, shape.kv_heads, shape.head_dim) == ("gemma3_text", 8, 4, 256)
    assert (shape.vocab, shape.context, shape.sliding_window, shape.tied) == (262_208, 131_072, 1024, True)


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
        ({"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 2}, "fsfs", 64),
    ],
)
def test_layer_types(change: dict, types: str, window: int) -> None:
    shape = read_shape(LLAMA | change)
    assert "".join(kind[0] for kind in shape.layer_types) == types
    assert shape.sliding_window == window


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "smollm3"]
)
@pytest.mark.parametrize("sparse", [False, True])
def test_shape_agrees_with_transformers(model_type: str, sparse: bool) -> None:
    """Their config classes are the authority on defaults and layer types."""
    transformers = pytest.importorskip("transformers")
    given = {} if sparse else {"num_hidden_layers": 7, "sliding_window": 33}
    theirs = transformers.AutoConfig.for_model(model_type, **given)
    saved = theirs.to_dict()
    ours = read_shape(
        saved
        if not sparse
        else {key: saved[key] for key in saved if key not in ("head_dim", "layer_types", "tie_word_embeddings")}
    )
    assert ours.layers == theirs.num_hidden_layers
    assert ours.hidden == theirs.hidden_size
    assert ours.heads == theirs.num_attention_heads
    assert ours.kv_heads == (getattr(theirs, "num_key_value_heads", None) or theirs.num_attention_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.vocab == theirs.vocab_size
    assert ours.context == theirs.max_position_embeddings
    assert ours.tied == theirs.tie_word_embeddings
    if getattr(theirs, "layer_types", None):
        assert ours.layer_types == tuple("sliding" if "sliding" in kind else "full" for kind in theirs.layer_types)


def test_every_supported_type_is_one_of_transformers() -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    assert set(SUPPORTED) <= set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, -1, "many", True, 1.5])
def test_bad_config_names_the_key(key: str, value: object) -> None:
    with pytest.raises(CorruptModel, match=key):
        read_shape(LLAMA | {key: value}, "toy")


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({"model_type": "weird", "auto_map": {"AutoModelForCausalLM": "x.py"}}, UnsafeModel, "weird"),
        ({"model_type": "bert"}, Unsupported, "encoder"),
        ({"model_type": "t5"}, Unsupported, "encoder-decoder"),
        ({"model_type": "mamba"}, Unsupported, "mamba"),
        ({}, CorruptModel, "model_type"),
    ],
)
def test_refused_architectures(config: dict, kind: type[LowMemError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        check_supported(config, "acme/toy")
    assert "acme/toy" in caught.value.message
    assert caught.value.hint


def test_own_code_of_a_known_family_is_ignored_not_refused() -> None:
    check_supported({"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "x.py"}}, "phi")


def test_a_tied_head_and_buffers_do_not_count_as_parameters() -> None:
    tensors = (
        Tensor("model.embed_tokens.weight", "fp16", (10, 4), 80),
        Tensor("lm_head.weight", "fp16", (10, 4), 80),
        Tensor("h.0.attn.bias", "fp32", (1, 1, 8, 8), 256),
        Tensor("h.0.attn.c_attn.bias", "fp32", (12,), 48),
    )

    def parameters(tied: bool) -> int:
        about = {"layers": 1, "hidden": 4, "intermediate": 4, "heads": 1, "kv_heads": 1, "head_dim": 4}
        spec = ModelSpec(
            ModelSource("r", "n"), "llama", tensors, **about, vocab=10, context=8, layer_types=("full",), tied=tied
        )
        return spec.parameters

    assert parameters(tied=True) == 52
    assert parameters(tied=False) == 92
