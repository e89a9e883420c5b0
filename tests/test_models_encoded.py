"""Checkpoints of codes and scales are dequantized as they are read, held as planned, and compute what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encoded_toys
import pytest
import torch
import toys
import transformers
from conftest import machine
from families.check import held_bytes
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lowmem.events import CancelToken, drain
from lowmem.machine.budget import MemoryBudget
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.source import read_spec
from lowmem.offload.plans import place_blocks
from lowmem.planning.goal import Goal
from lowmem.planning.placement import Placement
from lowmem.planning.planner import plan
from lowmem.runtime import loader

IDS = torch.tensor([toys.prompt(40, seed=3)])

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


CASES: dict[str, tuple[encoded_toys.Encode, dict[str, Any] | None, str]] = {
    "FP8 blocks": (encoded_toys.fp8_blocks, FP8, "FP8"),
    "FP8 blocks, not described": (encoded_toys.fp8_blocks, None, "FP8"),
    "FP8 blocks of 32": (
        lambda weight: encoded_toys.fp8_blocks(weight, 32, 32),
        {**FP8, "weight_block_size": [32, 32]},
        "FP8",
    ),
    "FP8 rows": (encoded_toys.fp8_rows, compressed("float-quantized", num_bits=8, strategy="channel"), "FP8"),
    "FP8 one scale": (encoded_toys.fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8"),
    "FP8 one scale, not described": (encoded_toys.fp8_tensor, None, "FP8"),
    "W4A16": (encoded_toys.packed(4, 32), compressed("pack-quantized", num_bits=4, group_size=32), "INT4"),
    "W4A16 asymmetric": (
        encoded_toys.packed(4, 32, symmetric=False),
        compressed("pack-quantized", num_bits=4, group_size=32, symmetric=False),
        "INT4",
    ),
    "W4A16 actorder": (
        encoded_toys.packed(4, 32, act_order=True),
        compressed("pack-quantized", num_bits=4, group_size=32, actorder="group"),
        "INT4",
    ),
    "W8A16": (encoded_toys.packed(8, -1), compressed("pack-quantized", num_bits=8, strategy="channel"), "INT8"),
    "W8A8 asymmetric": (
        encoded_toys.int8(-1, symmetric=False),
        compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        "INT8",
    ),
    "W8 groups": (
        encoded_toys.int8(32, symmetric=True),
        compressed("int-quantized", num_bits=8, group_size=32),
        "INT8",
    ),
    "NVFP4": (encoded_toys.nvfp4, compressed("nvfp4-pack-quantized", num_bits=4, group_size=16), "NVFP4"),
}


def loaded(folder: Path, precision: str) -> tuple[PreTrainedModel, int]:
    """The model, and the bytes of weights that its plan predicted."""
    planned = plan(
        read_spec(str(folder)),
        machine(ram_gb=16),
        MemoryBudget(ram=4_000_000_000),
        Goal(context=256, precision=precision),
    )
    model = drain(loader.load(planned, folder, CancelToken())).model
    return model, planned.main.share("weights")


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_the_codes_stand_for(tmp_path: Path, case: str) -> None:
    encode, described, kind = CASES[case]
    reference = encoded_toys.save(toys.fresh("llama"), tmp_path, encode, described)
    spec = read_spec(str(tmp_path))
    assert spec.dequantized == kind
    assert not spec.quantization
    model, predicted = loaded(tmp_path, "fp32")
    assert held_bytes(model) == predicted
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_encoded_weights_are_held_in_int8(tmp_path: Path) -> None:
    reference = encoded_toys.save(toys.fresh("llama"), tmp_path, encoded_toys.fp8_blocks, FP8)
    model, predicted = loaded(tmp_path, "int8")
    assert held_bytes(model) == predicted
    found, wanted = model(IDS).logits, reference(IDS).logits
    assert (found - wanted).std() < 0.1 * wanted.std()


def test_rows_of_encoded_weights_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    for name, encode in {
        "blocks": encoded_toys.fp8_blocks,
        "words": encoded_toys.packed(4, 40, symmetric=False),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        parts, dense = encode(weight)
        save_file({f"w.weight{ending}": part for ending, part in parts.items()}, folder / "model.safetensors")
        monkeypatch.setattr("lowmem.models.checkpoint.CONVERSION_BYTES", 130 * 200 * 4)
        with Checkpoint(folder) as checkpoint:
            torch.testing.assert_close(checkpoint.read_into("w.weight", torch.empty(300, 200)), dense)
            some = checkpoint.tensors["w.weight"].rows(128, 259)
            torch.testing.assert_close(checkpoint.read_entry(some), dense[128:259])


MIXTURE = {
    "vocab_size": toys.VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": toys.CONTEXT, "pad_token_id": toys.PAD,
    "bos_token_id": toys.BOS, "eos_token_id": toys.EOS,
}  # fmt: skip


def random_model(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model


def save_experts(model: PreTrainedModel, folder: Path, encode: encoded_toys.Encode, described: Any) -> None:
    """Like `encoded_toys.save`, with the experts one by one, under the names that the hub's checkpoints have."""
    encoded_toys.save(model, folder, encode, described)
    tensors = {}
    for name, tensor in encoded_toys.load(folder).items():
        if ".mlp.experts." not in name:
            tensors[name] = tensor
            continue
        layer, _, stacked = name.partition(".mlp.experts.")
        for expert, weight in enumerate(tensor):
            halves = (
                zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True)
                if "gate_up" in stacked
                else [("down_proj", weight)]
            )
            for part, half in halves:
                parts, dense = encode(half)
                half.copy_(dense)
                owner = f"{layer}.mlp.experts.{expert}.{part}.weight"
                tensors |= {owner + ending: one.contiguous() for ending, one in parts.items()}
        model.get_parameter(name).copy_(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_experts_that_are_encoded_one_by_one(tmp_path: Path, precision: str) -> None:
    model = random_model(transformers.Qwen3MoeConfig(**MIXTURE))
    save_experts(
        model, tmp_path, lambda weight: encoded_toys.fp8_blocks(weight, 32, 32), {**FP8, "weight_block_size": [32, 32]}
    )
    found, predicted = loaded(tmp_path, precision)
    assert held_bytes(found) == predicted
    if precision == "fp32":
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mxfp4_experts_of_gpt_oss(tmp_path: Path, precision: str) -> None:
    config = transformers.GptOssConfig(**MIXTURE | {"num_local_experts": 4, "sliding_window": 16})
    model = random_model(config)
    model.save_pretrained(tmp_path)
    toys.tokenizer().save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            parts, dense = encoded_toys.mxfp4(tensor.transpose(1, 2))
            tensor.copy_(dense.transpose(1, 2))
            tensors |= {name + ending: part.contiguous() for ending, part in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoded_toys.packed_toys.edit_config(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert read_spec(str(tmp_path)).dequantized == "MXFP4"
    found, predicted = loaded(tmp_path, precision)
    assert held_bytes(found) == predicted
    if precision == "fp32":
        torch.testing.assert_close(found(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_encoded_blocks_stream_from_disk(tmp_path: Path) -> None:
    model = random_model(transformers.Qwen3MoeConfig(**MIXTURE))
    described = {**FP8, "weight_block_size": [32, 32]}
    save_experts(model, tmp_path, lambda weight: encoded_toys.fp8_blocks(weight, 32, 32), described)
    budget, goal = MemoryBudget(ram=4_000_000_000), Goal(context=256, precision="fp32")
    dense = plan(read_spec(str(tmp_path)), machine(ram_gb=16), budget, goal)
    placed = place_blocks(dense, Placement(("disk", "ram")))
    assert placed.placement is not None
    assert not placed.placement.mapped  # there is nothing in the files that could be used in place
    loaded_model = drain(loader.load(placed, tmp_path, CancelToken()))
    torch.testing.assert_close(loaded_model.model(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    loaded_model.close()
