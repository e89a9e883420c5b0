"""Offloaded models compute what resident ones compute, and say clearly when their files are taken away."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import packed_toys
import pytest
import toys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowmem.errors import BadInput, CorruptModel, ModelNotFound
from lowmem.events import CancelToken
from lowmem.offload import blocks as block_module
from lowmem.offload.attach import Offloaded, apply
from lowmem.offload.transfer import Host, OnDevice
from lowmem.planning.placement import PAGE, Placement, all_at_home, chosen, spread

DISK = Placement(("disk", "disk"))
PROMPT = torch.tensor([toys.prompt(24)])


@pytest.fixture(params=toys.NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it: in the layout that the file has."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


@pytest.mark.parametrize("mapped", [False, True])
def test_from_disk_bit_for_bit_and_back(family: str, tmp_path: Path, mapped: bool) -> None:
    model = resident(toys.save_toy(family, tmp_path))
    expected = logits(model)
    offloaded = apply(model, tmp_path, Placement(("disk", "disk"), mapped))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    offloaded.remove()
    assert torch.equal(logits(model), expected)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_streamed_blocks_hold_no_memory(tmp_path: Path) -> None:
    model = resident(toys.save_toy("llama", tmp_path))
    offloaded = apply(model, tmp_path, chosen(all_at_home_of(model), "disk", [1]))
    kinds = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    assert all(empty == (".layers.1." in name) for name, empty in kinds.items())
    assert offloaded.streamer.bytes_per_pass == sum(
        tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items() if ".layers.1." in name
    )


def all_at_home_of(model: PreTrainedModel) -> Placement:
    return Placement(("ram",) * model.config.num_hidden_layers)
