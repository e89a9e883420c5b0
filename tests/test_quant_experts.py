"""Experts and hybrids through the pipeline: names, statistics, sizes, and what is read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from families import zoo
from quantizing import quantize_events
from torch import nn

from lowmem.errors import Unsupported
from lowmem.events import Receipt, Step, drain, until_receipt
from lowmem.kernels.packing import from_gptq
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.experts import Concatenated
from lowmem.models.matching import match_names
from lowmem.models.modules import empty_model
from lowmem.models.source import read_spec
from lowmem.quant import block
from lowmem.quant.calibration import Calibration

FEW = Calibration(samples=3, length=32)
MANY = Calibration(samples=8, length=64)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save("mixtral", tmp_path_factory.mktemp("mixture"))


def events(folder: Path, out: Path, method: str, calibration: Calibration = FEW, **options: Any) -> Iterator[Any]:
    return quantize_events(folder, out, method, {"group_size": 32, **options}, calibration)


def quantize(folder: Path, out: Path, method: str, calibration: Calibration = FEW, **options: Any) -> Receipt:
    receipt = drain(until_receipt(events(folder, out, method, calibration, **options)))
    assert receipt.disk_bytes == receipt.details["predicted_bytes"]
    return receipt


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_experts_are_stored_by_the_hubs_names(method: str, mixture: Path, tmp_path: Path) -> None:
    quantize(mixture, tmp_path / "out", method)
    original, names = stored(mixture), set(stored(tmp_path / "out"))
    experts = {name for name in original if ".experts." in name}
    assert len(experts) == 4 * 5 * 3
    for name in experts:
        assert name.replace(".weight", ".qweight") in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names  # the router


def test_packed_experts_become_layers_of_the_model(mixture: Path, tmp_path: Path) -> None:
    quantize(mixture, tmp_path / "out", "rtn")
    model = empty_model(tmp_path / "out")
    with Checkpoint(tmp_path / "out") as checkpoint:
        names = match_names(model, checkpoint)
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts.gate_up_proj, nn.ModuleList)
    assert isinstance(experts.gate_up_proj[0], Concatenated)
    assert names["model.layers.0.mlp.experts.gate_up_proj.3.1.qweight"].endswith(
        "block_sparse_moe.experts.3.w3.qweight"
    )
    assert names["model.layers.0.mlp.experts.down_proj.3.qweight"].endswith("block_sparse_moe.experts.3.w2.qweight")


def test_experts_that_the_hub_stacks_are_numbered(tmp_path: Path) -> None:
    quantize(zoo.save("gpt_oss", tmp_path / "toy"), tmp_path / "out", "rtn", bits=8)
    original, found = stored(tmp_path / "toy"), stored(tmp_path / "out")
    name = "model.layers.1.mlp.experts.down_proj"
    parts = {part: found[f"{name}.2.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    weight = from_gptq(parts, 8, v2=True).dequantize()
    assert torch.allclose(weight.t(), original[name][2], atol=0.01)  # stored [inputs, outputs] by this family
    assert f"{name}_bias" in found


def test_calibration_pays_for_experts_too(mixture: Path, tmp_path: Path) -> None:
    losses = {name: quantize(mixture, tmp_path / name, name, MANY).details["losses"] for name in ("rtn", "gptq")}
    experts = [name for name in losses["gptq"] if ".experts." in name]
    assert len(experts) == 60
    mean = {name: sum(found[expert] for expert in experts) / 60 for name, found in losses.items()}
    assert mean["gptq"] < 0.6 * mean["rtn"]


def test_experts_that_saw_too_little_share_the_statistics_of_all(mixture: Path, tmp_path: Path) -> None:
    few = quantize(mixture, tmp_path / "few", "gptq", FEW)
    assert any("experts saw too little of the calibration text" in note for note in few.notes)
    many = quantize(mixture, tmp_path / "many", "gptq", MANY)
    assert not many.notes


def test_hessians_of_experts_in_several_passes_give_the_same_bytes(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(mixture, tmp_path / "whole", "gptq")
    monkeypatch.setattr(block, "experts_at_once", lambda _columns, _experts: 2)
    quantize(mixture, tmp_path / "parts", "gptq")
    whole, parts = stored(tmp_path / "whole"), stored(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_stopped_mixture_goes_on_to_the_same_bytes(mixture: Path, tmp_path: Path) -> None:
    quantize(mixture, tmp_path / "whole", "gptq")
    running = events(mixture, tmp_path / "out", "gptq")
    next(step for step in running if isinstance(step, Step) and "Block 3" in step.note)
    running.close()
    assert quantize(mixture, tmp_path / "out", "gptq").details["resumed_blocks"] == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_layers_that_fit_no_words_stay_as_they_are_and_are_named(tmp_path: Path) -> None:
    receipt = quantize(zoo.save("qwen2_moe", tmp_path / "toy"), tmp_path / "out", "gptq")
    assert any("mlp.shared_expert_gate" in note for note in receipt.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {r"-:.*\.mlp\.shared_expert_gate$": {}}


@pytest.mark.parametrize("kind", ["lfm2", "jamba", "qwen3_next", "gpt_neo", "olmo2", "cohere"])
def test_other_blocks_are_calibrated(kind: str, tmp_path: Path) -> None:
    receipt = quantize(zoo.save(kind, tmp_path / "toy"), tmp_path / "out", "awq")
    assert receipt.details["loss"] < 0.1


def test_blocks_that_cannot_be_run_apart_are_refused_for_calibration_only(tmp_path: Path) -> None:
    folder = zoo.save("gemma3n_text", tmp_path / "toy")
    with pytest.raises(Unsupported, match="GPTQ runs one block at a time, which gemma3n_text models do not allow"):
        next(events(folder, tmp_path / "out", "gptq"))
    assert not (tmp_path / "out.part").exists()
    quantize(folder, tmp_path / "out", "rtn")


def test_a_router_that_is_a_linear_layer_and_also_chooses_is_no_layer_to_replace(tmp_path: Path) -> None:
    spec = read_spec(str(zoo.save("phimoe", tmp_path)))
    assert {t.role for t in spec.tensors if t.name.endswith("router.weight")} == {"other"}
