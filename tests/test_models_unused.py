"""A tensor that no layer reads is refused, unless it is known to be without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
import transformers
from safetensors.torch import load_file, save_file
from test_models_files import edit_config

from lowmem.errors import CorruptModel
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.matching import match_names
from lowmem.models.modules import empty_model
from lowmem.models.source import read_spec


def add(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: torch.ones(3) for name in names}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BLOCK = "model.layers.1"


@pytest.mark.parametrize(
    "name",
    [
        f"{BLOCK}.mlp.up_proj.weight_scale_2",  # codes that would be taken for numbers
        f"{BLOCK}.mlp.up_proj.bias",
        f"{BLOCK}.self_attn.q_norm.weight",
        f"{BLOCK}.self_attn.sinks",
        f"{BLOCK}.mlp.router.weight",
        f"{BLOCK}.mlp.up_proj.lora_A.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_norm.weight",
        "lm_head.bias",
    ],
)
def test_tensors_without_a_layer_are_refused(tmp_path: Path, name: str) -> None:
    folder = toys.save_toy("llama", tmp_path)
    add(folder, name)
    with pytest.raises(CorruptModel, match=name):
        read_spec(str(folder))
    with Checkpoint(folder) as checkpoint, pytest.raises(CorruptModel, match=name):
        match_names(empty_model(folder), checkpoint)


def test_tensors_without_effect_are_left_out(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path)
    plain = read_spec(str(folder)).tensors
    add(
        folder,
        f"{BLOCK}.self_attn.rotary_emb.inv_freq",
        f"{BLOCK}.self_attn.k_proj.input_scale",
        f"{BLOCK}.self_attn.k_scale",
        f"{BLOCK}.mlp.up_proj.weight_shape",
        "mtp.layers.0.mlp.up_proj.weight",
        "v_head.summary.weight",
    )
    assert read_spec(str(folder)).tensors == plain


def test_masks_of_older_versions_are_left_out(tmp_path: Path) -> None:
    folder = toys.save_toy("gpt2", tmp_path)
    add(folder, "transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias")
    assert read_spec(str(folder))


def test_layers_that_draft_tokens_are_left_out(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path)
    add(folder, "model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight")
    edit_config(folder, num_nextn_predict_layers=1)
    assert read_spec(str(folder)).layers == 2


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_what_a_larger_model_sees_with_is_left_out(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "gemma3"
    config = transformers.Gemma3Config(
        text_config=toys.config("gemma3").to_dict(),
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16},
    )
    config.save_pretrained(folder)
    tensors = {f"{prefix}{name}": tensor.clone() for name, tensor in toys.toy("gemma3").state_dict().items()}
    tensors |= {"vision_tower.layers.0.up.weight": torch.ones(3), "multi_modal_projector.norm.weight": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    assert read_spec(str(folder)).layers == 2
    add(folder, f"{prefix}model.layers.1.mlp.up_proj.bias")
    with pytest.raises(CorruptModel, match=r"up_proj\.bias"):
        read_spec(str(folder))


def test_a_parameter_under_an_old_and_a_new_name_is_read_once(tmp_path: Path) -> None:
    folder = toys.save_toy("gpt2", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["wte.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert read_spec(str(folder))


def test_buffers_that_are_saved_with_a_model_are_needed(tmp_path: Path) -> None:
    """The bias of a router is a buffer of zeros until it is read: an answer without it would be wrong, and look right."""
    config = transformers.DeepseekV3Config(
        vocab_size=toys.VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(torch.arange(4.0))
    model.save_pretrained(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        names = match_names(empty_model(tmp_path), checkpoint)
        assert checkpoint.read(names[name]).tolist() == [0, 1, 2, 3]
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CorruptModel, match=name):
        read_spec(str(tmp_path))
