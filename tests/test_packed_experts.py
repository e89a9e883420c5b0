"""Mixtures whose experts are stored quantized one by one run from their codes, a layer an expert."""

from __future__ import annotations

from pathlib import Path

import packed_toys
import pytest
import torch
import toys
import transformers
from families.check import held_bytes
from packed_toys import Recipe
from safetensors.torch import load_file, save_file
from test_models_encoded import MIXTURE, random_model
from test_packed_models import planned
from transformers import PreTrainedModel

from lowmem.events import CancelToken, drain
from lowmem.kernels import packed_linear
from lowmem.kernels.packed_linear import PackedLinear
from lowmem.models.experts import Concatenated
from lowmem.models.source import read_spec
from lowmem.planning.model_bytes import weight_bytes
from lowmem.precisions import stored as stored_precision
from lowmem.runtime import loader

IDS = torch.tensor([toys.prompt(40, seed=3)])

RECIPES = [Recipe(bits=4), Recipe(bits=3, act_order=True), Recipe(bits=4, symmetric=False, layout="gemm")]


def save(folder: Path, recipe: Recipe, dense: str = "") -> PreTrainedModel:
    """Write a mixture quantized by `recipe`, but for layers with `dense` in their names; returns what it stands for."""
    model = random_model(transformers.Qwen3MoeConfig(**MIXTURE))
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or (dense and dense in name):
            tensors[name] = tensor
            continue
        weight = packed_toys.round_to_nearest(tensor, recipe)
        tensors |= {f"{layer}.{part}": one.contiguous() for part, one in packed_toys.parts_of(weight, recipe).items()}
        place(model, name, weight.dequantize())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    packed_toys.edit_config(folder, recipe.config())
    return model


def place(model: PreTrainedModel, name: str, weight: torch.Tensor) -> None:
    """Put the weight that the hub's name stands for into the model, which has experts stacked."""
    if ".experts." not in name:
        model.get_parameter(name).copy_(weight)
        return
    owner, _, rest = name.partition(".experts.")
    expert, part, _ = rest.split(".")
    stacked = model.get_parameter(f"{owner}.experts.{'down_proj' if part == 'down_proj' else 'gate_up_proj'}")[
        int(expert)
    ]
    half = {"gate_proj": slice(0, len(weight)), "up_proj": slice(len(weight), None), "down_proj": slice(None)}[part]
    stacked[half].copy_(weight)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_packed_experts(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "cpu_kernel", lambda _: "plain")
    monkeypatch.setattr(stored_precision, "has_int8_kernels", lambda: False)
    reference = save(tmp_path, recipe)
    spec = read_spec(str(tmp_path))
    assert (spec.experts, spec.experts_per_token) == (4, 2)
    model = drain(loader.load(planned(tmp_path), tmp_path, CancelToken())).model
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj[3], Concatenated)
    assert isinstance(experts.gate_up_proj[3][0], PackedLinear)
    assert isinstance(experts.down_proj[3], PackedLinear)
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_experts_left_dense_beside_packed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "cpu_kernel", lambda _: "plain")
    monkeypatch.setattr(stored_precision, "has_int8_kernels", lambda: False)
    reference = save(tmp_path, Recipe(bits=4), dense="experts.2.up_proj")
    model = drain(loader.load(planned(tmp_path), tmp_path, CancelToken())).model
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


def test_packed_experts_take_their_predicted_bytes(tmp_path: Path) -> None:
    save(tmp_path, Recipe(bits=8, group=-1))
    spec = read_spec(str(tmp_path))
    layers = [name for name in spec.packed_layers if ".experts." in name]
    assert len(layers) == 2 * 4 * 3
    assert spec.parameters == sum(p.numel() for p in random_model(transformers.Qwen3MoeConfig(**MIXTURE)).parameters())
    model = drain(loader.load(planned(tmp_path), tmp_path, CancelToken())).model
    assert held_bytes(model) == weight_bytes(spec, "stored", "fp32")


def test_generates_from_packed_experts(tmp_path: Path) -> None:
    reference = save(tmp_path, Recipe(bits=4))
    model = drain(loader.load(planned(tmp_path), tmp_path, CancelToken())).model
    found, wanted = model(IDS).logits, reference(IDS).logits
    assert (found - wanted).std() < 0.1 * wanted.std()
