"""Reading config.json: the model's shape (layers, heads, window, context), and whether the model is supported.

Knows the keys and defaults of the families in `SUPPORTED`, nothing about files or weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.errors import CorruptModel, UnsafeModel, Unsupported
from lowmem.messages import msg

Config = Mapping[str, Any]

SUPPORTED = (
    "llama", "mistral", "mixtral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "gemma", "gemma2", "gemma3", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj",
    "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "stablelm", "smollm3", "olmo", "olmo2", "olmo3", "olmoe",
    "granite", "cohere", "cohere2", "starcoder2", "codegen", "xglm", "biogpt", "nemotron", "glm", "glm4", "helium",
    "persimmon", "arcee", "apertus", "seed_oss", "exaone4", "ernie4_5", "hunyuan_v1_dense", "internlm3",
)  # fmt: skip
"""Causal language models that transformers implements with a standard KV cache.

Code in their repositories (`auto_map`) is not needed and never run."""

_ENCODERS = frozenset({
    "albert", "bert", "camembert", "clip", "convbert", "deberta", "deberta-v2", "distilbert", "electra",
    "ernie", "longformer", "mobilebert", "modernbert", "mpnet", "nomic_bert", "roberta", "siglip",
    "squeezebert", "vit", "wav2vec2", "xlm-roberta",
})  # fmt: skip
_NO_TEXT = frozenset({"clip", "siglip", "vit", "wav2vec2"})
_ENCODER_DECODERS = frozenset({
    "bart", "blenderbot", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5", "whisper",
})  # fmt: skip

_NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "hidden_dim"),
    "context": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "vocab": ("vocab_size",),
}
_GEMMA3_DEFAULTS = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
    "max_position_embeddings": 131_072, "sliding_window": 4096, "sliding_window_pattern": 6,
}  # fmt: skip
# Values that a config.json may leave out because transformers' own config class holds them.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3": _GEMMA3_DEFAULTS,
    "gemma3_text": _GEMMA3_DEFAULTS,
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "bloom": {"seq_length": 2048},
    "falcon": {"max_position_embeddings": 2048, "multi_query": True},
    "gpt_bigcode": {"multi_query": True},
    "starcoder2": {"num_key_value_heads": 2},
}
_TIED_BY_DEFAULT = frozenset({
    "gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "gemma", "gemma2", "gemma3",
    "gemma3_text", "smollm3", "cohere", "cohere2", "starcoder2", "xglm", "biogpt", "ernie4_5",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """The fields of `ModelSpec` that config.json decides; their meaning is documented there."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    layer_types: tuple[str, ...]
    sliding_window: int
    tied: bool


def is_encoder(model_type: str) -> bool:
    """Is this an encoder model, which reads text but does not generate any?"""
    return model_type in _ENCODERS


def check_supported(config: Config, name: str, encoders: bool = False) -> None:
    """Refuse models that cannot be run, or only with code from their repository.

    Args:
        encoders: accept text encoders too.

    Raises:
        UnsafeModel: the architecture exists only as code in the repository.
        Unsupported: an encoder, or an architecture without a standard KV cache.
        CorruptModel: no model_type.
    """
    model_type = config.get("model_type")
    if model_type in SUPPORTED or (encoders and model_type in _ENCODERS - _NO_TEXT):
        return
    if not isinstance(model_type, str) or not model_type:
        raise CorruptModel(
            msg("config.json of {name} has no model_type.", name=name), msg("Check that this is a transformers model.")
        )
    choose = msg("Choose a text generation model, such as one from the list.")
    if config.get("auto_map"):
        raise UnsafeModel(
            msg(
                "{name} needs Python code from its own repository to run (model_type {model_type!r}).",
                name=name,
                model_type=model_type,
            ),
            msg("lowmem never runs downloaded code: choose a text generation model, such as one from the list."),
        )
    if model_type in _ENCODERS:
        raise Unsupported(
            msg(
                "{name} is an encoder ({model_type}): it reads text but does not generate any.",
                name=name,
                model_type=model_type,
            ),
            choose,
        )
    if model_type in _ENCODER_DECODERS:
        raise Unsupported(
            msg(
                "{name} is an encoder-decoder ({model_type}), not a causal language model.",
                name=name,
                model_type=model_type,
            ),
            choose,
        )
    raise Unsupported(
        msg(
            "{name} has an architecture that lowmem does not support (model_type {model_type!r}).",
            name=name,
            model_type=model_type,
        ),
        choose,
    )


def read_shape(config: Config, name: str = msg("the model")) -> Shape:
    """Read the shape from a config.json, with GPT-2 style keys and nested `text_config` too.

    Raises:
        CorruptModel: a number is missing or invalid.
    """
    text = config.get("text_config")
    outer_type = str(config.get("model_type", ""))
    merged = {**_DEFAULTS.get(outer_type, {}), **config}
    if isinstance(text, Mapping):
        merged |= _DEFAULTS.get(str(text.get("model_type", "")), {}) | dict(text)
    model_type = str(merged.get("model_type") or outer_type)
    layers, hidden, heads = (_number(merged, key, name) for key in ("layers", "hidden", "heads"))
    layer_types, window = _layer_types(merged, model_type, layers)
    head_dim = _positive(merged, ("head_dim",), name) or max(1, hidden // heads)
    return Shape(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        intermediate=_intermediate(merged, hidden, name),
        heads=heads,
        kv_heads=_kv_heads(merged, heads, name),
        head_dim=head_dim,
        vocab=_number(merged, "vocab", name),
        context=_number(merged, "context", name),
        layer_types=layer_types,
        sliding_window=window,
        tied=_tied(config, merged, model_type),
    )


def _positive(config: Config, names: tuple[str, ...], owner: str) -> int:
    """The value of the first of `names` that is present, 0 when none is."""
    for key in names:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
            raise CorruptModel(
                msg("config.json of {owner} has {key} = {value!r}.", owner=owner, key=key, value=str(value)[:40]),
                msg("Fetch the model again."),
            )
        return value
    return 0


def _number(config: Config, field: str, owner: str) -> int:
    value = _positive(config, _NAMES[field], owner)
    if not value:
        raise CorruptModel(
            msg("config.json of {owner} has no {names}.", owner=owner, names=_NAMES[field][0]),
            msg("Fetch the model again."),
        )
    return value


def _intermediate(config: Config, hidden: int, name: str) -> int:
    return _positive(config, _NAMES["intermediate"], name) or hidden * int(config.get("expansion_ratio") or 4)


def _kv_heads(config: Config, heads: int, name: str) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    nested = config.get("attn_config")
    kv = nested.get("kv_n_heads") if isinstance(nested, Mapping) else None
    return int(kv) if kv else _positive(config, _NAMES["kv_heads"], name) or heads


def _layer_types(config: Config, model_type: str, layers: int) -> tuple[tuple[str, ...], int]:
    """ "full" or "sliding" for each layer, and the window, by the rules of transformers' config classes."""
    window = config.get("sliding_window") or 0
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        window = 0
    if model_type in {"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"} and not config.get("use_sliding_window"):
        window = 0
    given, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if not window:
        sliding = [False] * layers
    elif isinstance(given, list) and len(given) == layers:
        sliding = [kind == "sliding_attention" for kind in given]
    elif isinstance(pattern, int) and pattern > 0:
        sliding = [(i + 1) % pattern != 0 for i in range(layers)]
    elif model_type.startswith("qwen"):
        sliding = [i >= int(config.get("max_window_layers", 28)) for i in range(layers)]
    else:
        sliding = [model_type in {"mistral", "ministral", "mixtral", "phi3", "starcoder2"}] * layers
    types = tuple("sliding" if flag else "full" for flag in sliding)
    return types, window if any(sliding) else 0


def _tied(config: Config, merged: Config, model_type: str) -> bool:
    # The outer value wins: it is the one that the model class reads.
    given = (source.get("tie_word_embeddings") for source in (config, merged))
    return bool(next((value for value in given if value is not None), model_type in _TIED_BY_DEFAULT))
