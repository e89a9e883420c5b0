"""Toys as GPTQ and AWQ checkpoints, rounded to nearest, in every layout that tools write; and what they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toys
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.kernels.packing import to_awq, to_gptq
from lowmem.kernels.quantized import Quantized


@dataclass(frozen=True)
class Recipe:
    bits: int = 4
    group: int = 32
    symmetric: bool = True
    layout: str = "gptq"
    act_order: bool = False

    def config(self) -> dict[str, Any]:
        if self.layout == "gemm":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": True, "version": "gemm"}
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.act_order,
            "sym": self.symmetric,
            "checkpoint_format": self.layout,
        }


def round_to_nearest(weight: Tensor, recipe: Recipe) -> Quantized:
    """`weight` [out, in] on a grid; with act-order, groups are made of scattered inputs."""
    inputs, largest = weight.shape[1], 2**recipe.bits - 1
    size = inputs if recipe.group < 0 else recipe.group
    groups = torch.arange(inputs, dtype=torch.int32) // size
    if recipe.act_order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
    count = int(groups.max()) + 1
    scales, zeros = (torch.empty(weight.shape[0], count) for _ in range(2))
    for group in range(count):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp_max(0), part.amax(1).clamp_min(0)
        if recipe.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = ((high - low) / largest).clamp_min(1e-5).half().float()
        # The first layout cannot hold a zero point of 0.
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, largest)
    if recipe.symmetric:
        zeros.fill_(2 ** (recipe.bits - 1))
    index = groups.long()
    codes = (weight / scales[:, index] + zeros[:, index]).round().clamp(0, largest)
    return Quantized(codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8), groups, recipe.bits)


def parts_of(weight: Quantized, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of a layer as its layout names them, the zero bias of AutoGPTQ not among them."""
    return to_awq(weight) if recipe.layout == "gemm" else to_gptq(weight, v2=recipe.layout == "gptq_v2")


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def save(
    name: str, folder: Path, recipe: Recipe, recipe_of: Callable[[str], Recipe | None] | None = None
) -> PreTrainedModel:
    """Write the toy quantized by `recipe`; returns the toy with the dense weights that the file stands for.

    Args:
        recipe_of: the recipe of each layer instead, None to leave it dense.
    """
    toys.save_toy(name, folder)
    file, model = folder / "model.safetensors", toys.fresh(name)
    tensors = load_file(file)
    for layer_name, layer in linears(model).items():
        transposed = isinstance(layer, Conv1D)
        own = recipe_of(layer_name) if recipe_of else recipe
        if own is None:
            continue
        weight = round_to_nearest(layer.weight.t() if transposed else layer.weight, own)
        layer.weight.copy_(weight.dequantize().t() if transposed else weight.dequantize())
        del tensors[f"{layer_name}.weight"]
        tensors |= {f"{layer_name}.{part}": tensor.contiguous() for part, tensor in parts_of(weight, own).items()}
    save_file(tensors, file)
    edit_config(folder, recipe.config())
    return model


def quantize(source: Path, folder: Path, recipe: Recipe) -> Path:
    """A model folder's blocks by `recipe`, in a folder of its own; returns that folder."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, part = name.rpartition(".")
        if tensor.dim() == 2 and part == "weight" and ".layers." in layer:
            parts = parts_of(round_to_nearest(tensor.float(), recipe), recipe)
            tensors |= {f"{layer}.{key}": value.contiguous() for key, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, recipe.config())
    return folder


def edit_config(folder: Path, quantization: dict[str, Any] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
