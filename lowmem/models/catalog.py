"""A catalog of good models up to 8B parameters, described exactly enough to plan without a network.

The numbers are those of each repository's config.json and weight files. `source.py` prefers the headers of the
files where it can read them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.models.derive import derive
from lowmem.models.reference import DEMO
from lowmem.models.spec import ModelSource, ModelSpec


@dataclass(frozen=True)
class Entry:
    """A model of the catalog.

    Args:
        ref: a hub id, or "demo".
        label: display name.
        parameters: as published.
        use: "chat", "completion" or "code".
        quality: rank for automatic choice: higher answers better (0-100, our judgement of public evaluations).
        more_bytes: of the weight files besides the parameters: a copy of a tied embedding, causal masks.
        config: the fields of its config.json that determine its shape.
        dtype: dtype of the stored weights.
    """

    ref: str
    label: str
    licence: str
    parameters: int
    use: str
    quality: int
    config: dict[str, Any] = field(hash=False, repr=False)
    dtype: str = "bf16"
    gated: bool = False
    more_bytes: int = 0

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
    source = ModelSource(entry.ref, entry.label, licence=entry.licence, gated=entry.gated)
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


_APACHE = "apache-2.0"
_MASK = 4 * 1024 * 1024
"""Bytes of the causal mask that GPT-2 stores in every layer."""

# Arguments of _config: layers, hidden, intermediate, heads, kv heads, vocabulary, context.
CATALOG: tuple[Entry, ...] = (
    Entry(
        DEMO, "SmolLM2-135M-Instruct", _APACHE, 134_515_008, "chat", 20,
        _config("llama", 30, 576, 1536, 9, 3, 49_152, 8192),
    ),
    Entry(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "SmolLM2-360M-Instruct", _APACHE, 361_821_120, "chat", 30,
        _config("llama", 32, 960, 2560, 15, 5, 49_152, 8192),
    ),
    Entry(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", "SmolLM2-1.7B-Instruct", _APACHE, 1_711_376_384, "chat", 50,
        _config("llama", 24, 2048, 8192, 32, 32, 49_152, 8192),
    ),
    Entry(
        "HuggingFaceTB/SmolLM3-3B", "SmolLM3-3B", _APACHE, 3_075_098_624, "chat", 73,
        _config("smollm3", 36, 2048, 11_008, 16, 4, 128_256, 65_536),
    ),
    Entry(
        "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct", _APACHE, 494_032_768, "chat", 36,
        _config("qwen2", 24, 896, 4864, 14, 2, 151_936, 32_768),
    ),
    Entry(
        "Qwen/Qwen2.5-1.5B-Instruct", "Qwen2.5-1.5B-Instruct", _APACHE, 1_543_714_304, "chat", 55,
        _config("qwen2", 28, 1536, 8960, 12, 2, 151_936, 32_768),
    ),
    Entry(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct", _APACHE, 1_543_714_304, "code", 48,
        _config("qwen2", 28, 1536, 8960, 12, 2, 151_936, 32_768),
    ),
    Entry(
        "Qwen/Qwen2.5-3B-Instruct", "Qwen2.5-3B-Instruct", "qwen-research", 3_085_938_688, "chat", 68,
        _config("qwen2", 36, 2048, 11_008, 16, 2, 151_936, 32_768),
    ),
    Entry(
        "Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct", _APACHE, 7_615_616_512, "chat", 86,
        _config("qwen2", 28, 3584, 18_944, 28, 4, 152_064, 32_768, tied=False),
    ),
    Entry(
        "Qwen/Qwen3-0.6B", "Qwen3-0.6B", _APACHE, 596_049_920, "chat", 42,
        _config("qwen3", 28, 1024, 3072, 16, 8, 151_936, 40_960, head_dim=128), more_bytes=2 * 151_936 * 1024,
    ),
    Entry(
        "Qwen/Qwen3-1.7B", "Qwen3-1.7B", _APACHE, 1_720_574_976, "chat", 60,
        _config("qwen3", 28, 2048, 6144, 16, 8, 151_936, 40_960, head_dim=128), more_bytes=2 * 151_936 * 2048,
    ),
    Entry(
        "Qwen/Qwen3-4B", "Qwen3-4B", _APACHE, 4_022_468_096, "chat", 82,
        _config("qwen3", 36, 2560, 9728, 32, 8, 151_936, 40_960, head_dim=128),
    ),
    Entry(
        "Qwen/Qwen3-8B", "Qwen3-8B", _APACHE, 8_190_735_360, "chat", 90,
        _config("qwen3", 36, 4096, 12_288, 32, 8, 151_936, 40_960, head_dim=128, tied=False),
    ),
    Entry(
        "meta-llama/Llama-3.2-1B-Instruct", "Llama-3.2-1B-Instruct", "llama3.2", 1_235_814_400, "chat", 46,
        _config("llama", 16, 2048, 8192, 32, 8, 128_256, 131_072), gated=True,
    ),
    Entry(
        "meta-llama/Llama-3.2-3B-Instruct", "Llama-3.2-3B-Instruct", "llama3.2", 3_212_749_824, "chat", 70,
        _config("llama", 28, 3072, 8192, 24, 8, 128_256, 131_072), gated=True,
    ),
    Entry(
        "meta-llama/Llama-2-7b-hf", "Llama-2-7b", "llama2", 6_738_415_616, "completion", 58,
        _config("llama", 32, 4096, 11_008, 32, 32, 32_000, 4096, tied=False), dtype="fp16", gated=True,
    ),
    Entry(
        "mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-Instruct-v0.3", _APACHE, 7_248_023_552, "chat", 83,
        _config("mistral", 32, 4096, 14_336, 32, 8, 32_768, 32_768, tied=False),
    ),
    Entry(
        "google/gemma-3-1b-it", "gemma-3-1b-it", "gemma", 999_885_952, "chat", 49,
        _config(
            "gemma3_text", 26, 1152, 6912, 4, 1, 262_144, 32_768,
            head_dim=256, sliding_window=512, sliding_window_pattern=6,
        ), gated=True,
    ),
    Entry(
        "google/gemma-2-2b-it", "gemma-2-2b-it", "gemma", 2_614_341_888, "chat", 64,
        _config("gemma2", 26, 2304, 9216, 8, 4, 256_000, 8192, head_dim=256, sliding_window=4096), gated=True,
    ),
    Entry(
        "microsoft/Phi-3.5-mini-instruct", "Phi-3.5-mini-instruct", "mit", 3_821_079_552, "chat", 74,
        _config("phi3", 32, 3072, 8192, 32, 32, 32_064, 131_072, tied=False, sliding_window=262_144),
    ),
    Entry(
        "microsoft/phi-2", "phi-2", "mit", 2_779_683_840, "completion", 52,
        _config("phi", 32, 2560, 10_240, 32, 32, 51_200, 2048, tied=False), dtype="fp16",
    ),
    Entry(
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-Chat", _APACHE, 1_100_048_384, "chat", 32,
        _config("llama", 22, 2048, 5632, 32, 4, 32_000, 2048, tied=False),
    ),
    Entry("distilbert/distilgpt2", "distilgpt2", _APACHE, 81_912_576, "completion", 5, _gpt2(6, 768, 12), "fp32", more_bytes=6 * _MASK),
    Entry("openai-community/gpt2", "gpt2", "mit", 124_439_808, "completion", 8, _gpt2(12, 768, 12), "fp32", more_bytes=12 * _MASK),
    Entry(
        "openai-community/gpt2-medium", "gpt2-medium", "mit", 354_823_168, "completion", 12,
        _gpt2(24, 1024, 16), "fp32", more_bytes=24 * _MASK,
    ),
)  # fmt: skip
"""Smallest family first, smallest member first."""

_SHORT_IDS = {entry.label: entry.ref for entry in CATALOG if entry.config["model_type"] == "gpt2"}
