"""Toys of every type in transformers' causal mapping: four layers, random weights, saved as the hub saves checkpoints.

Sizes follow from the names of a configuration's fields, so that a new type needs no line here; `EXCEPTIONS` holds what
cannot follow, each with its reason.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from pathlib import Path
from typing import Any

import torch
import toys
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 4
WIDTH, EMBEDDING, TIED = 0.1, 1.0, 0.02
"""Standard deviations of matrices, embeddings and tied embeddings.

A layer adds to its input about as much as it finds there: were it much more, roundings would grow from layer to layer
until they choose other experts and other tokens to attend to. A tied embedding is narrow, or the last token were the
best next one whatever the layers say.
"""
CONTEXT = 512
WINDOW = 16
"""Tokens that sliding layers see: fewer than the prompts have."""

_CAUSAL: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_WITH_IMAGES: dict[str, str] = dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

_ENCODER = "an encoder that transformers can also build as a decoder: no such checkpoint generates text"
_HALF = "the decoder of an encoder-decoder: it does not generate without the encoder's output"
_AUDIO = "speech or music, not text"
_IMAGE = "does not read text without an image"
_DRAFT = "a draft head: it reads the hidden states and the cache of the model that it drafts for"


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


EXCLUDED: dict[str, str] = {
    **_all(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
        "roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod",
        _ENCODER,
    ),
    **_all("bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart prophetnet trocr", _HALF),
    **_all("moshi moss_transcribe_diarize musicgen musicgen_melody whisper", _AUDIO),
    **_all("gemma4_assistant gemma4_unified_assistant", _DRAFT),
    **_all("blip git got_ocr2 idefics kosmos-2 kosmos-2.5", _IMAGE),
    **_all("pix2struct pp_formulanet t5gemma2 udop vision-encoder-decoder florence2", "an encoder-decoder"),
    "diffusion_gemma": "a diffusion model: it does not write token by token",
    "evolla": "reads proteins, and transformers 5.24 cannot build it from a configuration",
    "pi0": "moves robots",
    "blt": "its patches of bytes come from a second model, and transformers 5.24 cannot generate with it",
    "reformer": "its axial positions accept texts of one length only",
    "xlnet": "a permutation model, which transformers generates with by padding every step",
}
"""Types of the causal mapping that are no causal text models, each with the reason."""


def _without_causal_text() -> set[str]:
    """Vision-language types whose text model is no type of the causal mapping."""
    found = set()
    for kind in _WITH_IMAGES.keys() - _CAUSAL.keys():
        text = CONFIG_MAPPING[kind].sub_configs.get("text_config")
        if text is None or (text is not transformers.AutoConfig and text.model_type not in _CAUSAL):
            found.add(kind)
    return found


ADDED = {"llava", "mistral3", "smolvlm"} | _without_causal_text()
"""Types outside the causal mapping whose checkpoints people run as text; a few of those whose text is a causal type."""

TYPES: tuple[str, ...] = tuple(sorted({*_CAUSAL, *ADDED} - EXCLUDED.keys()))

SIZES: dict[str, Any] = {
    "vocab_size": toys.VOCABULARY,
    "vocab_size_per_layer_input": toys.VOCABULARY,
    **_all("hidden_size n_embd d_model word_embed_proj_dim embedding_size lru_width", 96),
    **_all("intermediate_size n_inner ffn_dim d_ff ffn_hidden_size dense_intermediate_size intermediate_size_mlp", 160),
    **_all("num_hidden_layers n_layer n_layers num_layers", LAYERS),
    **_all("num_attention_heads n_head n_heads num_heads attention_heads", 6),
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "rotary_dim": 8,
    **_all("max_position_embeddings n_positions n_ctx max_seq_len", CONTEXT),
    # Experts
    **_all("num_local_experts num_experts n_routed_experts moe_num_experts", 5),
    **_all("num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts", 2),
    **_all("moe_intermediate_size expert_ffn_hidden_size expert_dim", 32),
    **_all("shared_expert_intermediate_size moe_shared_expert_intermediate_size", 64),
    **_all("n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace", 1),
    # Latent attention
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # Recurrent layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    **_all("mamba_num_heads mamba_n_heads n_mamba_heads", 12),
    **_all("mamba_head_dim mamba_d_head", 16),
    **_all("mamba_d_state ssm_state_size state_size", 12),
    **_all("mamba_n_groups n_groups mamba_ngroups", 2),
    "mamba_d_ssm": 192,
    "mamba_d_conv": 4,
    **_all("mamba_expand expand", 2),
    **_all("mamba_chunk_size chunk_size", 16),
    **_all("mamba_dt_rank time_step_rank", 8),
    **_all("linear_num_heads linear_head_dim", 6),
    # What layers see
    **_all("sliding_window sliding_window_size window_size attention_chunk_size attention_window_size", WINDOW),
    **_all("index_head_dim indexer_head_dim", 16),
    **_all("index_n_heads indexer_n_heads", 2),
    "index_topk": 8,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    # Low ranks and side inputs
    "hidden_size_per_layer_input": 8,
    "router_hidden_size": 32,
    "laurel_rank": 8,
    "hc_lowrank": 8,
    "o_groups": 2,
    "o_lora_rank": 16,
    "d_rel": 8,
    "rel_extent": 32,
    **_all("dim_ff dff shared_intermediate_size shared_experts_intermediate_size", 64),
    **_all("dim_head swa_head_dim", 16),
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 2,
    "zero_expert_num": 2,
    # Vision towers
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "out_hidden_size": 96,
    "pad_token_id": toys.PAD,
    "bos_token_id": toys.BOS,
    "eos_token_id": toys.EOS,
}
"""The size of every field that a configuration may have."""

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_RECURRENT = ["linear_attention", "full_attention"] * 2

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Layer kinds that the default configuration does not show.
    "bamba": {"attn_layer_indices": [1, 3]},
    "dots1": {"layer_types": _ALTERNATING},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "laguna": {"layer_types": _ALTERNATING, "num_attention_heads_per_layer": [6, 6, 6, 6]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mellum": {"layer_types": _ALTERNATING},
    "ministral": {"layer_types": _ALTERNATING},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    # The last two layers read keys and values of the first two.
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 32},
    # The mixture (26B-A4B): experts beside the MLP, full layers that use keys for values.
    "gemma4_text": {
        "enable_moe_block": True,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
    # The dense ones (E2B): side inputs by layer, two layers that read the keys and values of the first two.
    "gemma4": {"text_config": {"num_kv_shared_layers": 2, "global_head_dim": 32, "use_double_wide_mlp": True}},
    # The only number of experts or heads that the family allows.
    "dots3_note_text": {"num_key_value_heads": 6, "head_dim": 24, "per_layer_config": {}},
    "zaya": {"num_experts_per_tok": 1},
    # Checkpoints scale attention by head_dim; the default does not, so that small errors choose other tokens.
    **_all("granite granitemoe granitemoeshared", {"attention_multiplier": 0.25}),
    "granitemoehybrid": {"attention_multiplier": 0.25, "layer_types": _RECURRENT},
    # Its mixer weighs experts within 2 % of the best alike, and others not at all: a rounding would halve an expert.
    "phimoe": {"router_jitter_noise": 0.5},
    # One field under a name that means something else elsewhere.
    "mamba2": {"num_heads": 12},
    "longcat_flash": {"head_dim": 8},  # of the rotated part
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 4},  # widths are rounded up to multiples of 64
    "inkling2_text": {"unpadded_vocab_size": toys.VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": toys.VOCABULARY},
    "mimo_v2_flash": {"num_attention_heads": 8, "v_head_dim": 8},  # sliding layers have twice the heads of keys
    # Two layers before, four twice over, two after.
    "dory": {
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
    },
    # Vision-language models: fields without a default, or with one of another kind.
    "chameleon": {"vocabulary_map": {"<image>": 201}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 16]},
    "glm5_next_text": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/2"},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [3, 3, 2]}},
    **_all("qwen2_5_omni_thinker qwen3_omni_moe_thinker", {"vision_start_token_id": 202}),
    "molmo2_vision": {"image_size": [32, 32]},
    "molmo2_adapter": {"vision_feature_layer": [0, 1]},
    # Towers with sizes of their own, as small as they allow.
    "gemma4_vision": {"position_embedding_size": 32},
    "gemma4_audio": {"subsampling_conv_channels": [16, 8], "output_proj_dims": 96},
    "gemma4_unified_vision": {"mm_embed_dim": 96, "mm_posemb_size": 32, "output_proj_dims": 96},
    "llama4_vision_model": {"projector_input_dim": 96, "projector_output_dim": 96, "vision_output_dim": 96},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 32,
        "ext_pw_out_channel": 96,
        "num_blocks": 2,
        "depthwise_separable_out_channel": 96,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 96,
        "adapter_out_dim": 96,
        "mlp_layer_types": ["dense"] * 4,
        "per_layer_config": {},
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 96, "adapter_out_dim": 96, "downsample_hidden_size": 16},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 200, "<image>": 201}},
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 16, "channel_multiplier": [1, 1], "attn_resolutions": []},
    # Rotation given by layer kind, without a default.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "qwen4_exp_text": {"indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 4},
}
"""Fields that do not follow from `SIZES`, by type."""


def config(kind: str) -> transformers.PreTrainedConfig:
    """The configuration of a type's toy."""
    return _small(CONFIG_MAPPING[kind], EXCEPTIONS.get(kind, {}))


def _small(cls: type[transformers.PreTrainedConfig], exceptions: dict[str, Any]) -> transformers.PreTrainedConfig:
    try:
        default: Any = cls()
    except Exception:  # some have no default
        default = None
    known = _fields(cls)
    values = {name: size for name, size in SIZES.items() if name in known}
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        sub = type(getattr(default, name)) if sub is transformers.AutoConfig else sub
        if hasattr(sub, "model_type"):
            special = exceptions.get(name) or EXCEPTIONS.get(sub.model_type, {})
            values[name] = _small(sub, special).to_dict()
            exceptions = {field: value for field, value in exceptions.items() if field != name}
    if "kv_lora_rank" in known:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latents are expanded to every head
    return cls(**{**values, **_layer_kinds(default, known), **_rotation(default, values), **exceptions})


def _rotation(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Rotation by three positions (time, height, width): their shares of a head's rotated pairs."""
    rope = getattr(default, "rope_parameters", None) or {}
    if "mrope_section" not in {*rope, *getattr(default, "ignore_keys_at_rope_validation", ())}:
        return {}
    width = values.get("qk_rope_head_dim") or values.get("head_dim") or 16
    pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    share = pairs * 3 // 8
    return {"rope_parameters": {**rope, "mrope_section": [share, share, pairs - 2 * share]}}


def _fields(cls: type) -> set[str]:
    """Names that a configuration class accepts."""
    annotated = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    return {*annotated, *inspect.signature(cls.__init__).parameters, *getattr(cls, "attribute_map", {})}


def _layer_kinds(default: Any, known: set[str]) -> dict[str, list[str]]:
    """Every kind of layer that the family's default has, in turn, ending with the default's last."""
    found = {}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        alias = name in getattr(type(default), "attribute_map", {})
        if kinds and name in known and not alias and not isinstance(getattr(type(default), name, None), property):
            distinct = list(dict.fromkeys(kinds))
            shift = LAYERS - 1 - distinct.index(kinds[-1])
            found[name] = [distinct[(layer - shift) % len(distinct)] for layer in range(LAYERS)]
    return found


@functools.cache
def model(kind: str) -> transformers.PreTrainedModel:
    """The toy of a type, as the class that the hub's checkpoints are saved by; the same object every time."""
    if kind == "gemma3n":  # the tower needs timm; the text half is all that is run
        return model("gemma3n_text")
    seed = zlib.crc32(kind.encode())
    torch.manual_seed(seed)
    toy = getattr(transformers, architecture(kind))._from_config(config(kind), dtype=torch.float32)
    tied = bool(getattr(toy.config.get_text_config(), "tie_word_embeddings", False))
    generator = torch.Generator().manual_seed(seed)
    embedding = toy.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in toy.named_parameters():
            width = WIDTH if parameter is not embedding else TIED if tied else EMBEDDING
            parameter.copy_(_weights(name, parameter, generator, width))
        for buffer in persistent_buffers(toy):
            if buffer.is_floating_point():
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return toy.eval().requires_grad_(False)


def architecture(kind: str) -> str:
    """The class that wrote the hub's checkpoints of a type: the whole model, vision tower included, where there is one."""
    return _WITH_IMAGES.get(kind) or _CAUSAL[kind]


def _weights(name: str, initial: torch.Tensor, generator: torch.Generator, width: float) -> torch.Tensor:
    """Matrices wide enough that the best token is clear; everything else near its initial value, which is sane.

    Norms keep their 1 (or 0), Mamba's decays and step sizes their range.
    """
    noise = torch.randn(initial.shape, generator=generator)
    if initial.dim() < 2 or any(part in name for part in ("A_log", "time_", "norm")):
        return initial + noise * 0.1
    return noise * width


def persistent_buffers(toy: torch.nn.Module) -> list[torch.Tensor]:
    """Buffers that checkpoints hold, such as the biases of experts. A loader that skips them keeps initial values."""
    saved = toy.state_dict().keys()
    return [buffer for name, buffer in toy.named_buffers() if name in saved]


def save(kind: str, folder: Path) -> Path:
    """Write the toy and its tokenizer as a model folder, with the hub's names of tensors."""
    if kind == "gemma3n":
        _save_gemma3n(folder)
    else:
        model(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _save_gemma3n(folder: Path) -> None:
    """The hub's names: the text half under `model.language_model`, beside a tower's and an embedder's tensors."""
    text = model("gemma3n_text")
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.state_dict().items()}
    del tensors["lm_head.weight"]  # tied
    tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.ones(8, 3, 3, 3)
    tensors["model.embed_vision.embedding.weight"] = torch.ones(8, 96)
    whole = config("gemma3n")
    whole.text_config = text.config
    whole.architectures = [architecture("gemma3n")]
    whole.dtype = torch.float32
    whole.save_pretrained(folder)
    text.generation_config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per printable character of ASCII; the others are written out, so that texts are equal when tokens are.

    Tokenizer classes of some types put another decoder in place of ours; this vocabulary reads the same in all.
    """
    texts = {index: chr(index) if 33 <= index < 127 else f"<{index}>" for index in range(256)}
    core = Tokenizer(models.BPE(vocab={text: index for index, text in texts.items()}, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(toys.SPECIALS.values()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=toys.SPECIALS[toys.PAD],
        unk_token=toys.SPECIALS[toys.PAD],
        bos_token=toys.SPECIALS[toys.BOS],
        eos_token=toys.SPECIALS[toys.EOS],
        additional_special_tokens=[toys.SPECIALS[toys.TURN]],
        chat_template=toys.CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def reference(kind: str, folder: Path) -> transformers.PreTrainedModel:
    """The toy as transformers loads it from its folder, in fp32.

    Raises:
        AssertionError: transformers finds tensors missing.
    """
    if kind == "gemma3n":
        return model("gemma3n_text")
    auto = transformers.AutoModelForCausalLM if kind in _CAUSAL else transformers.AutoModelForImageTextToText
    for loader in (auto, getattr(transformers, architecture(kind))):
        loaded, report = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if not report["missing_keys"]:  # AutoModelForCausalLM's half of some checkpoints stays random
            return loaded.eval()
    raise AssertionError(f"transformers misses {sorted(report['missing_keys'])[:3]}")
