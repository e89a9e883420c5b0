"""Checkpoints under the names of transformers' parameters: joined, cut, computed, and read in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from lowmem.models.checkpoint import Checkpoint, Converted, Entry
from lowmem.models.matching import match_names
from lowmem.models.modules import empty_model

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def saved(config: transformers.PreTrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def read(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        names = match_names(empty_model(folder), checkpoint)
        return {name: checkpoint.read(stored) for name, stored in names.items()}


def test_experts_stored_one_by_one_become_one_parameter(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=3, tie_word_embeddings=False)
    model = saved(config, tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        apart = [name for name in checkpoint.tensors if ".experts." in name]
        names = match_names(empty_model(tmp_path), checkpoint)
        name = "model.layers.1.mlp.experts.gate_up_proj"
        entry = checkpoint.tensors[names[name]]
        assert isinstance(entry, Entry)
        assert len(entry.extents) == 6
        whole = model.get_parameter(name)
        assert torch.equal(checkpoint.read(names[name]), whole)
        assert torch.equal(checkpoint.read_entry(entry.rows(1, 2))[0], whole[1])
        half = checkpoint.read_into(names[name], torch.empty(whole.shape, dtype=torch.bfloat16))
        assert torch.equal(half, whole.bfloat16())
    assert len(apart) == 2 * 3 * 3
    assert names.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["GlmConfig", "GptOssConfig", "Qwen3NextConfig", "PersimmonConfig", "ApertusConfig"])
def test_parameters_and_buffers_are_those_that_were_saved(kind: str, tmp_path: Path) -> None:
    more = {"num_local_experts": 3, "num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = getattr(transformers, kind)(**SMALL, **more, pad_token_id=0, tie_word_embeddings=False)
    model = saved(config, tmp_path)
    found, expected = read(tmp_path), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_rearranged_is_computed_when_it_is_read(tmp_path: Path) -> None:
    stored = torch.arange(12.0).view(3, 4)
    from safetensors.torch import save_file

    save_file({"w": stored}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        source = checkpoint.tensors["w"]
        assert isinstance(source, Entry)
        checkpoint.tensors["turned"] = Converted("fp32", (4, 3), (source,), lambda tensors: tensors[0].t())
        assert torch.equal(checkpoint.read("turned"), stored.t())
        assert torch.equal(checkpoint.read_into("turned", torch.empty(4, 3)), stored.t())
        assert torch.equal(checkpoint.read_entry(checkpoint.tensors["turned"].rows(1, 3)), stored.t()[1:3])


def test_a_missing_head_is_the_embedding_whatever_the_configuration_says(tmp_path: Path) -> None:
    model = saved(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    empty = empty_model(tmp_path)
    with Checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in match_names(empty, checkpoint)
    assert empty.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.config.tie_word_embeddings


def test_rows_of_joined_tensors_begin_and_end_within_files() -> None:
    from lowmem.models.checkpoint import Extent

    one, two = Extent(Path("a"), 100, 40), Extent(Path("b"), 7, 80)
    entry = Entry("fp32", (3, 10), (one, two))
    assert entry.rows(0, 1).extents == (one,)
    assert entry.rows(1, 2).extents == (Extent(Path("b"), 7, 40),)
    assert entry.rows(0, 2).extents == (one, Extent(Path("b"), 7, 40))
    assert entry.rows(2, 3).nbytes == 40
