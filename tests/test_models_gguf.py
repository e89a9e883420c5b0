"""GGUF models of many families, split or whole, become what llama.cpp made them of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import toys
import transformers
from conftest import machine
from test_models_encoded import random_model
from transformers import PreTrainedModel

from lowmem.errors import Unsupported
from lowmem.events import CancelToken, drain
from lowmem.machine.budget import MemoryBudget
from lowmem.models.fetch import fetch
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime import loader

IDS = torch.tensor([toys.prompt(40, seed=3)])

SHAPE: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": toys.CONTEXT,
    "pad_token_id": toys.PAD, "bos_token_id": toys.BOS, "eos_token_id": toys.EOS, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaConfig", {}),
    "linear rope": ("llama", "LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn rope": ("llama", "LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}}),
    "mixtral": ("llama", "MixtralConfig", EXPERTS),
    "qwen2": ("qwen2", "Qwen2Config", {}),
    "qwen3": ("qwen3", "Qwen3Config", {}),
    "qwen3 mixture": ("qwen3moe", "Qwen3MoeConfig", EXPERTS | {"norm_topk_prob": True}),
    "gemma": ("gemma", "GemmaConfig", {"tie_word_embeddings": True}),
    "granite": ("granite", "GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "olmo2": ("olmo2", "Olmo2Config", {}),
    "seed_oss": ("seed_oss", "SeedOssConfig", {}),
    "arcee": ("arcee", "ArceeConfig", {}),
}  # fmt: skip

PAIRS = ("llama", "granite", "arcee")
"""Architectures whose queries and keys llama.cpp stores with the halves of each head interleaved."""


def metadata(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if "attention_factor" in rope:
        writer.add_float32(f"{arch}.rope.scaling.attn_factor", rope["attention_factor"])
    if rope["rope_type"] in ("linear", "yarn", "spiral"):
        writer.add_string(f"{arch}.rope.scaling.type", rope["rope_type"])
        writer.add_float32(f"{arch}.rope.scaling.factor", rope["factor"])
    if context := rope.get("original_max_position_embeddings"):
        writer.add_uint32(f"{arch}.rope.scaling.original_context_length", context)
    if getattr(config, "num_experts_per_tok", None):
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(32)
    if arch == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_float32("granite.attention.scale", config.attention_multiplier)
    characters = toys._byte_characters()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*characters[:255], characters[254] + characters[253], *toys.SPECIALS.values()])
    writer.add_token_types([1] * 256 + [3] * 4)
    writer.add_token_merges([f"{characters[254]} {characters[253]}"])
    writer.add_bos_token_id(toys.BOS)
    writer.add_eos_token_id(toys.EOS)
    writer.add_pad_token_id(toys.PAD)


def tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """What llama.cpp stores, by its names."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names, found = gguf.get_tensor_name_map(kind, 2), {}
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        module, _, member = name.rpartition(".")
        values = tensor.float().numpy()
        if stacked := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name):
            block = f"blk.{stacked[1]}.ffn"
            if stacked[2] == "down_proj":
                found[f"{block}_down_exps.weight"] = values
            else:
                found[f"{block}_gate_exps.weight"], found[f"{block}_up_exps.weight"] = np.split(values, 2, axis=1)
            continue
        if arch in PAIRS and module.endswith(("q_proj", "k_proj")):
            heads = values.shape[0] // 16
            values = values.reshape(heads, 2, 8, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if arch == "gemma" and "norm" in name:
            values = values + 1
        theirs = names.get_name(module)
        assert theirs is not None, name
        found[f"{theirs}.{member}"] = values
    return found


def write(folder: Path, model: PreTrainedModel, arch: str, parts: int = 1, **more: np.ndarray) -> Path:
    """The model as GGUF in Q8_0, in several files if `parts` says so, with `more` tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = [*tensors(model, arch).items(), *((f"{name}.weight", values) for name, values in more.items())]
    paths = [folder / (f"toy-{n:05d}-of-{parts:05d}.gguf" if parts > 1 else "toy.gguf") for n in range(1, parts + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, arch)
        if number == 0:
            metadata(writer, model.config, arch)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
        for name, values in stored[number::parts]:
            if values.ndim > 1:
                packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths[0]


def round_to_q8(model: PreTrainedModel) -> None:
    """Q8_0 rounds 32 inputs together, whatever the order of the rows."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            packed = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType.Q8_0)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)))


def logits(path: Path) -> torch.Tensor:
    folder = drain(fetch(str(path), CancelToken()))
    goal = Goal(context=256, precision="fp32")
    planned = plan(read_spec(str(folder)), machine(ram_gb=16), MemoryBudget(ram=4_000_000_000), goal)
    return drain(loader.load(planned, folder, CancelToken())).model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    arch, kind, changes = FAMILIES[family]
    model = random_model(getattr(transformers, kind)(**SHAPE | changes))
    path = write(tmp_path, model, arch)
    round_to_q8(model)
    torch.testing.assert_close(logits(path), model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**SHAPE))
    path = write(tmp_path, model, "llama", parts=3)
    round_to_q8(model)
    assert read_spec(str(path)).size_on_disk == sum(file.stat().st_size for file in tmp_path.glob("*.gguf"))
    torch.testing.assert_close(logits(path), model(IDS).logits, rtol=1e-3, atol=1e-3)
    path.with_name("toy-00002-of-00003.gguf").unlink()
    with pytest.raises(Exception, match="toy-00002-of-00003"):
        read_spec(str(path))


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500_000.0}


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 16)])
def test_llama3_rope_lies_in_a_tensor(tmp_path: Path, factor: float, context: int) -> None:
    """Contexts other than 8192 occur in no model, but the factors tell them."""
    rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": context}
    model = random_model(transformers.LlamaConfig(**SHAPE | {"rope_parameters": rope}))
    rotary = model.model.rotary_emb
    plain = 500_000.0 ** (-torch.arange(0, 16, 2) / 16)
    path = write(tmp_path, model, "llama", rope_freqs=(plain / rotary.inv_freq).numpy().astype(np.float32))
    round_to_q8(model)
    assert (logits(path) - model(IDS).logits).abs().max() < 1e-3
    config = transformers.AutoConfig.from_pretrained(drain(fetch(str(path), CancelToken())))
    if context == 8192:
        assert config.rope_parameters == rope
    else:
        unscaled = random_model(
            transformers.LlamaConfig(**SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
        )
        round_to_q8(unscaled)
        assert (logits(path) - unscaled(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("context", [24, 64], ids=["long", "short"])
def test_longrope_lies_in_two_tensors(tmp_path: Path, context: int) -> None:
    short, long = (np.linspace(1, most, 8, dtype=np.float32) for most in (1.5, 6.0))
    rope = {
        "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(), "attention_factor": 1.25,
        "rope_theta": 1e4, "original_max_position_embeddings": context,
    }  # fmt: skip
    model = random_model(transformers.LlamaConfig(**SHAPE | {"rope_parameters": rope}))
    path = write(tmp_path, model, "llama", rope_factors_short=short, rope_factors_long=long)
    round_to_q8(model)
    torch.testing.assert_close(logits(path), model(IDS).logits, rtol=1e-3, atol=1e-3)


def test_rope_that_is_scaled_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    model = random_model(transformers.LlamaConfig(**SHAPE))
    model.config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Unsupported, match="spiral"):
        read_spec(str(write(tmp_path, model, "llama")))
