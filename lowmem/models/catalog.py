"""A catalog of good models for 1 to 24 GB, dense and mixtures of experts, described exactly enough to plan without a network.

The numbers are those of each repository's config.json and weight files. `source.py` prefers the headers of the
files where it can read them.

Entries of 2026 could not be compared with the hub's files. Their shapes are confirmed twice: by public configurations
(of maxtext, slime, torchtitan and google-deepmind/gemma, or metadata of GGUF files), and by the derived parameters, which
sum to the published number. Where one of the two is missing, the entry is not `verified`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.models.derive import derive
from lowmem.models.reference import DEMO
from lowmem.models.spec import ModelSource, ModelSpec

RANKING = "whatmodel.sh"
"""Where ranks come from: one scale of 0 to 100, fitted to all public evaluations of 732 models (November 2026)."""


@dataclass(frozen=True)
class Entry:
    """A model of the catalog.

    Args:
        ref: a hub id, or "demo".
        label: display name.
        parameters: as published; of a model that also sees or hears, those that read and write text.
        use: "chat" or "completion".
        quality: rank for automatic choice, 0 to 100: a higher one answers better.
        rank_source: where `quality` was published; "" for our guess, which is below all published ranks of its size.
        more_bytes: of the weight files besides the parameters: a copy of a tied embedding, causal masks, the parts of a
            model that see and hear. Negative where the files hold parameters in fewer bits than `dtype` has.
        config: the fields of its config.json that determine its shape, of the text model if there are others.
        dtype: dtype of the stored weights.
        verified: False if a field is from a single public source.
    """

    ref: str
    label: str
    licence: str
    parameters: int
    use: str
    quality: float
    config: dict[str, Any] = field(hash=False, repr=False)
    dtype: str = "bf16"
    gated: bool = False
    more_bytes: int = 0
    rank_source: str = RANKING
    verified: bool = True

    @property
    def chat(self) -> bool:
        """Trained for conversation, with a chat template."""
        return self.use != "completion"

    def spec(self) -> ModelSpec:
        """The spec that the model's files would give, without reading them."""
        return _spec(self)


def find(ref: str) -> Entry | None:
    """The entry of a reference; short ids from before the hub had organisations ("gpt2") work too."""
    ref = _SHORT_IDS.get(ref, ref)
    return next((entry for entry in CATALOG if entry.ref == ref), None)


def recommended() -> list[Entry]:
    """The models that "auto" chooses from, best first: for chat, and not gated."""
    return sorted((entry for entry in CATALOG if entry.chat and not entry.gated), key=lambda entry: -entry.quality)


def synthetic(
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab: int = 32_000,
    context: int = 4096,
    tied: bool = False,
    dtype: str = "fp16",
    name: str = "synthetic",
) -> ModelSpec:
    """The spec of a Llama of any size, for benchmarks and tests."""
    config = _config("llama", layers, hidden, intermediate, heads, kv_heads or heads, vocab, context, tied=tied)
    config |= {"head_dim": head_dim} if head_dim else {}
    return _assemble(config, ModelSource(name, name), dtype)


@functools.cache
def _spec(entry: Entry) -> ModelSpec:
    source = ModelSource(entry.ref, entry.label, licence=entry.licence, gated=entry.gated, verified=entry.verified)
    spec = _assemble(entry.config, source, entry.dtype, entry.chat)
    return replace(spec, size_on_disk=spec.size_on_disk + entry.more_bytes)


def _assemble(config: dict[str, Any], source: ModelSource, dtype: str, chat: bool = False) -> ModelSpec:
    anatomy = derive(config, source.name, None, dtype)
    size = sum(tensor.nbytes for tensor in anatomy.tensors)
    return ModelSpec(source=source, **anatomy.shape(), size_on_disk=size, has_chat_template=chat)


def _config(
    model_type: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, context: int,
    *, tied: bool = True, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "sliding_window": None,
        **more,
    }


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "n_positions": 1024,
        "vocab_size": 50_257,
    }


_FULL, _SLIDING, _LINEAR, _CONV = "full_attention", "sliding_attention", "linear_attention", "conv"


def _qwen3_5(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, value_heads: int, *, tied: bool = False
) -> dict[str, Any]:
    """Three gated delta nets to each layer of attention."""
    return _config(
        "qwen3_5_text", layers, hidden, intermediate, heads, kv_heads, 248_320, 262_144, tied=tied, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=value_heads, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_conv_kernel_dim=4, layer_types=([_LINEAR] * 3 + [_FULL]) * (layers // 4),
    )  # fmt: skip


def _gemma4(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, window: int, *, local: int, **more: Any
) -> dict[str, Any]:
    """`local` layers with a sliding window to each that sees everything, whose heads are twice as wide."""
    return _config(
        "gemma4_text", layers, hidden, intermediate, heads, kv_heads, 262_144, 262_144, head_dim=256,
        global_head_dim=512, layer_types=([_SLIDING] * local + [_FULL]) * (layers // (local + 1)),
    ) | {"sliding_window": window, **more}  # fmt: skip


def _gemma4_small(
    layers: int, hidden: int, intermediate: int, kv_heads: int, *, local: int, shared: int, wide: bool
) -> dict[str, Any]:
    """With embeddings for each layer; the last `shared` layers use the keys and values of earlier ones."""
    return _gemma4(
        layers, hidden, intermediate, 8, kv_heads, 512, local=local, max_position_embeddings=131_072,
        num_kv_shared_layers=shared, use_double_wide_mlp=wide,
        hidden_size_per_layer_input=256, vocab_size_per_layer_input=262_144,
    )  # fmt: skip


def _lfm2(kind: str, layers: int, intermediate: int, vocab: int, attention: set[int], **more: Any) -> dict[str, Any]:
    """Short convolutions, with attention in a few layers."""
    kinds = [_FULL if layer in attention else _CONV for layer in range(layers)]
    return _config(
        kind, layers, 2048, intermediate, 32, 8, vocab, 128_000, layer_types=kinds, conv_L_cache=3, **more
    )  # fmt: skip


_APACHE = "apache-2.0"
_LFM = "lfm1.0"
_MASK = 4 * 1024 * 1024
"""Bytes of the causal mask that GPT-2 stores in every layer."""

_MXFP4 = 13_761_264_768
"""Bytes of gpt-oss-20b's files, whose experts have 4 bits a weight and a shared exponent for every 32."""

# Arguments of _config: layers, hidden, intermediate, heads, kv heads, vocabulary, context.
CATALOG: tuple[Entry, ...] = (
    Entry(
        DEMO, "SmolLM2-135M-Instruct", _APACHE, 134_515_008, "chat", 15,
        _config("llama", 30, 576, 1536, 9, 3, 49_152, 8192), rank_source="",
    ),
    Entry(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "SmolLM2-360M-Instruct", _APACHE, 361_821_120, "chat", 25,
        _config("llama", 32, 960, 2560, 15, 5, 49_152, 8192), rank_source="",
    ),
    Entry(
        "HuggingFaceTB/SmolLM3-3B", "SmolLM3-3B", _APACHE, 3_075_098_624, "chat", 43.8,
        _config("smollm3", 36, 2048, 11_008, 16, 4, 128_256, 65_536),
    ),
    Entry(
        "Qwen/Qwen3.5-0.8B", "Qwen3.5-0.8B", _APACHE, 752_393_024, "chat", 37.7,
        _qwen3_5(24, 1024, 3584, 8, 2, 16, tied=True), more_bytes=2 * (100_592_896 + 20_452_864),
    ),
    Entry(
        "Qwen/Qwen3.5-2B", "Qwen3.5-2B", _APACHE, 1_881_825_088, "chat", 43,
        _qwen3_5(24, 2048, 6144, 8, 2, 16, tied=True), more_bytes=2 * (331_416_576 + 60_828_160), rank_source="",
    ),
    Entry(
        "Qwen/Qwen3.5-4B", "Qwen3.5-4B", _APACHE, 4_205_751_296, "chat", 60,
        _qwen3_5(32, 2560, 9216, 16, 4, 32, tied=True), more_bytes=2 * (333_514_240 + 120_599_552),
    ),
    Entry(
        "Qwen/Qwen3.5-9B", "Qwen3.5-9B", _APACHE, 8_953_803_264, "chat", 62,
        _qwen3_5(32, 4096, 12_288, 16, 4, 32), more_bytes=2 * (456_010_480 + 243_290_624),
    ),
    Entry(
        "Qwen/Qwen3.8-27B", "Qwen3.8-27B", _APACHE, 26_895_998_464, "chat", 71.8,
        _qwen3_5(64, 5120, 17_408, 24, 4, 48), more_bytes=2 * (460_730_096 + 424_699_392),
    ),
    Entry(
        "Qwen/Qwen3.6-35B-A3B", "Qwen3.6-35B-A3B", _APACHE, 34_660_610_688, "chat", 66.8,
        {
            **_qwen3_5(40, 2048, 512, 16, 2, 32), "model_type": "qwen3_5_moe_text", "num_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        }, more_bytes=2 * (446_571_248 + 844_640_768),
    ),
    Entry(
        "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct", _APACHE, 494_032_768, "chat", 29.8,
        _config("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768),
    ),
    Entry(
        "Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct", _APACHE, 7_615_616_512, "chat", 40,
        _config("qwen2", 28, 3584, 18_944, 28, 4, 152_064, 32_768, tied=False), rank_source="",
    ),
    Entry(
        "Qwen/Qwen3-0.6B", "Qwen3-0.6B", _APACHE, 596_049_920, "chat", 35.9,
        _config("qwen3", 28, 1024, 3072, 16, 8, 151_936, 40_960, head_dim=128), more_bytes=2 * 151_936 * 1024,
    ),
    Entry(
        "Qwen/Qwen3-4B", "Qwen3-4B", _APACHE, 4_022_468_096, "chat", 51.2,
        _config("qwen3", 36, 2560, 9728, 32, 8, 151_936, 40_960, head_dim=128),
    ),
    Entry(
        "Qwen/Qwen3-8B", "Qwen3-8B", _APACHE, 8_190_735_360, "chat", 55.6,
        _config("qwen3", 36, 4096, 12_288, 32, 8, 151_936, 40_960, head_dim=128, tied=False),
    ),
    Entry(
        "LiquidAI/LFM2.5-1.2B-Instruct", "LFM2.5-1.2B-Instruct", _LFM, 1_170_340_608, "chat", 44.5,
        _lfm2("lfm2", 16, 12_288, 65_536, {2, 5, 8, 10, 12, 14}, block_auto_adjust_ff_dim=True),
    ),
    Entry(
        "LiquidAI/LFM2.5-8B-A1B", "LFM2.5-8B-A1B", _LFM, 8_467_856_128, "chat", 52.3,
        _lfm2(
            "lfm2_moe", 24, 7168, 128_000, {2, 6, 10, 14, 18, 21}, num_experts=32, num_experts_per_tok=4,
            moe_intermediate_size=1792, num_dense_layers=2,
        ),
    ),
    Entry(
        "google/gemma-4-E2B-it", "gemma-4-E2B-it", _APACHE, 4_628_569_344, "chat", 47.1,
        _gemma4_small(35, 1536, 6144, 1, local=4, shared=20, wide=True), more_bytes=2 * 494_609_635,
    ),
    Entry(
        "google/gemma-4-E4B-it", "gemma-4-E4B-it", _APACHE, 7_463_013_376, "chat", 52.8,
        _gemma4_small(42, 2560, 10_240, 2, local=5, shared=18, wide=False), more_bytes=2 * 533_143_114,
    ),
    Entry(
        "google/gemma-4-12B-it", "gemma-4-12B-it", _APACHE, 11_907_350_272, "chat", 62,
        {
            **_gemma4(48, 3840, 15_360, 16, 8, 1024, local=5, attention_k_eq_v=True, num_global_key_value_heads=1),
            "model_type": "gemma4_unified_text",
        }, more_bytes=2 * 45_000_000, verified=False,
    ),
    Entry(
        "google/gemma-4-26B-A4B-it", "gemma-4-26B-A4B-it", _APACHE, 25_233_141_760, "chat", 63.5,
        _gemma4(
            30, 2816, 2112, 16, 8, 1024, local=5, attention_k_eq_v=True, num_global_key_value_heads=2,
            hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=128, top_k_experts=8,
            moe_intermediate_size=704,
        ), more_bytes=2 * 572_794_452,
    ),
    Entry(
        "openai/gpt-oss-20b", "gpt-oss-20b", _APACHE, 20_914_757_184, "chat", 58.2,
        _config(
            "gpt_oss", 24, 2880, 2880, 64, 8, 201_088, 131_072, tied=False, head_dim=64, num_local_experts=32,
            num_experts_per_tok=4, layer_types=[_SLIDING, _FULL] * 12,
        ) | {"sliding_window": 128}, more_bytes=_MXFP4 - 2 * 20_914_757_184,
    ),
    Entry(
        "mistralai/Ministral-3-3B-Instruct-2512-BF16", "Ministral-3-3B-Instruct", _APACHE, 3_429_006_336, "chat", 46.1,
        _config("ministral3", 26, 3072, 9216, 32, 8, 131_072, 262_144, head_dim=128), more_bytes=2 * 420_000_000,
        verified=False,
    ),
    Entry(
        "mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0.3", _APACHE, 7_248_023_552, "chat", 41,
        _config("mistral", 32, 4096, 14_336, 32, 8, 32_768, 32_768, tied=False),
    ),
    Entry(
        "ibm-granite/granite-4.1-3b", "granite-4.1-3b", _APACHE, 3_402_836_480, "chat", 50.5,
        _config("granite", 40, 2560, 8192, 40, 8, 100_352, 131_072),
    ),
    Entry(
        "ibm-granite/granite-4.1-8b", "granite-4.1-8b", _APACHE, 8_380_551_168, "chat", 55.2,
        _config("granite", 40, 4096, 12_800, 32, 8, 100_352, 131_072), more_bytes=2 * 100_352 * 4096, verified=False,
    ),
    Entry(
        "meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct", "llama3.2", 1_235_814_400, "chat", 27,
        _config("llama", 16, 2048, 8192, 32, 8, 128_256, 131_072), gated=True, rank_source="",
    ),
    Entry(
        "meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct", "llama3.2", 3_212_749_824, "chat", 40,
        _config("llama", 28, 3072, 8192, 24, 8, 128_256, 131_072), gated=True, rank_source="",
    ),
    Entry(
        "meta-llama/Llama-2-7b-hf", "Llama-2-7b", "llama2", 6_738_415_616, "completion", 25,
        _config("llama", 32, 4096, 11_008, 32, 32, 32_000, 4096, tied=False), "fp16", gated=True, rank_source="",
    ),
    Entry(
        "google/gemma-3-1b-it", "gemma-3-1b-it", "gemma", 999_885_952, "chat", 26,
        _config(
            "gemma3_text", 26, 1152, 6912, 4, 1, 262_144, 32_768,
            head_dim=256, sliding_window=512, sliding_window_pattern=6,
        ), gated=True, rank_source="",
    ),
    Entry(
        "google/gemma-2-2b-it", "gemma-2-2b-it", "gemma", 2_614_341_888, "chat", 35,
        _config("gemma2", 26, 2304, 9216, 8, 4, 256_000, 8192, head_dim=256, sliding_window=4096), gated=True,
        rank_source="",
    ),
    Entry(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-Chat", _APACHE, 1_100_048_384, "chat", 20,
        _config("llama", 22, 2048, 5632, 32, 4, 32_000, 2048, tied=False), rank_source="",
    ),
    Entry(
        "distilbert/distilgpt2", "distilgpt2", _APACHE, 81_912_576, "completion", 5,
        _gpt2(6, 768, 12), "fp32", more_bytes=6 * _MASK, rank_source="",
    ),
    Entry(
        "openai-community/gpt2", "gpt2", "mit", 124_439_808, "completion", 8,
        _gpt2(12, 768, 12), "fp32", more_bytes=12 * _MASK, rank_source="",
    ),
    Entry(
        "openai-community/gpt2-medium", "gpt2-medium", "mit", 354_823_168, "completion", 12,
        _gpt2(24, 1024, 16), "fp32", more_bytes=24 * _MASK, rank_source="",
    ),
)  # fmt: skip
"""Smallest family first, smallest member first."""

_SHORT_IDS = {entry.label: entry.ref for entry in CATALOG if entry.config["model_type"] == "gpt2"}
