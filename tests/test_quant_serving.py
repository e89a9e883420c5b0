"""What vLLM's loaders want of a folder, held against folders that were really made; and what the card says of it.

The expectations are those of vLLM's `auto_gptq.py` and `auto_awq.py`: keys of the configuration, and for every quantized
layer the names, dtypes and shapes of the parameters that they register.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from quantizing import quantize_events
from safetensors import safe_open

from lowmem.quant import get
from lowmem.quant.calibration import Calibration

LAYERS = 7 * 2
TEXT = Calibration(samples=2, length=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("serving"))


def made(source: Path, out: Path, method: str, **options: Any) -> Path:
    list(quantize_events(source, out, method, options, TEXT))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dict


def layers(stored: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]


SHAPES = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
          "gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}  # fmt: skip
"""(outputs, inputs) of the toy's layers."""


def configuration(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] in ("float16", "bfloat16")  # the dtypes that its kernels compute in
    found = config["quantization_config"]
    # vLLM looks into this file where config.json has nothing.
    assert json.loads((folder / "quantize_config.json").read_text()) == found
    return found


@pytest.mark.parametrize("method", ["gptq", "rtn", "hqq"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, -1])
def test_symmetric_gptq_is_what_its_loader_expects(source, tmp_path, method, bits, group):
    folder = made(source, tmp_path / "out", method, bits=bits, group_size=group, symmetric=True)
    config = configuration(folder)
    assert config["quant_method"] == "gptq"
    assert (config["bits"], config["sym"]) in {(4, True), (8, True)}
    assert config["group_size"] == group
    assert config["group_size"] in (-1, 32, 64, 128)
    assert config["desc_act"] is False
    assert config["lm_head"] is False
    assert config["checkpoint_format"] == "gptq"
    assert "dynamic" not in config
    stored = tensors(folder)
    assert len(layers(stored)) == LAYERS
    for layer in layers(stored):
        rows, columns = SHAPES[layer.rpartition(".")[2]]
        groups = 1 if group == -1 else columns // group
        per_word = 32 // bits
        expected = {
            "qweight": (torch.int32, (columns // per_word, rows)),
            "qzeros": (torch.int32, (groups, rows // per_word)),
            "scales": (torch.float16, (groups, rows)),
            "g_idx": (torch.int32, (columns,)),
        }
        for part, (dtype, shape) in expected.items():
            assert stored[f"{layer}.{part}"].dtype == dtype
            assert tuple(stored[f"{layer}.{part}"].shape) == shape
        # desc_act is false: the loader takes groups to be neighbours, whatever g_idx says.
        assert stored[f"{layer}.g_idx"].tolist() == [i // (columns // groups) for i in range(columns)]
        # Its types uint4b8 and uint8b128 have the middle code as zero, which v1 stores less one.
        zero = torch.tensor([((1 << bits - 1) - 1) << bits * place for place in range(per_word)]).sum()
        assert (stored[f"{layer}.qzeros"].to(torch.int64) & 0xFFFFFFFF).eq(zero).all()
    # Whatever is no float is taken for a quantized layer, by the name before its last dot.
    assert {name.rpartition(".")[0] for name, one in stored.items() if not one.is_floating_point()} == set(
        layers(stored)
    )
    card = (folder / "README.md").read_text()
    assert "    vllm serve FOLDER\n" in card


def test_act_order_is_said_in_the_configuration(source, tmp_path):
    folder = made(source, tmp_path / "out", "gptq", group_size=32, symmetric=True, order="activation")
    assert configuration(folder)["desc_act"] is True
    assert "vllm serve FOLDER" in (folder / "README.md").read_text()


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_is_what_its_loader_expects(source, tmp_path, symmetric):
    folder = made(source, tmp_path / "out", "awq", group_size=32, symmetric=symmetric)
    config = configuration(folder)
    assert (config["quant_method"], config["version"], config["bits"], config["group_size"]) == ("awq", "gemm", 4, 32)
    assert config["zero_point"] is not symmetric
    assert config["modules_to_not_convert"] is None
    stored = tensors(folder)
    assert len(layers(stored)) == LAYERS
    for layer in layers(stored):
        rows, columns = SHAPES[layer.rpartition(".")[2]]
        expected = {
            "qweight": (torch.int32, (columns, rows // 8)),
            "qzeros": (torch.int32, (columns // 32, rows // 8)),
            "scales": (torch.float16, (columns // 32, rows)),
        }
        parts = {name.rpartition(".")[2] for name in stored if name.startswith(f"{layer}.")}
        assert parts == set(expected)
        for part, (dtype, shape) in expected.items():
            assert stored[f"{layer}.{part}"].dtype == dtype
            assert tuple(stored[f"{layer}.{part}"].shape) == shape
    assert "    vllm serve FOLDER\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("gptq", {}, "GPTQ layers with zero points; quantize with symmetric on, or with AWQ"),
        ("gptq", {"bits": 3, "symmetric": True}, "GPTQ layers of 3 bits; quantize to 4 or 8 bits"),
        ("rtn", {"bits": 2}, "GPTQ layers of 2 bits"),
        ("hqq", {"group_size": 16, "symmetric": True}, "groups of 16; quantize in groups of 32, 64 or 128"),
        ("awq", {"group_size": 48}, "groups of 48"),
        ("awq", {"group_size": 256}, "groups of 256"),
    ],
)
def test_what_vllm_does_not_take_is_said_instead(method, options, words):
    serving = get(method).serving(get(method).Options(**options))
    assert words in serving
    assert "vllm serve" not in serving


def test_the_card_of_a_folder_that_vllm_does_not_take_says_so(source, tmp_path):
    card = (made(source, tmp_path / "out", "rtn", group_size=32) / "README.md").read_text()
    assert "vLLM's kernels do not take GPTQ layers with zero points" in card
    assert "vllm serve" not in card


def test_other_layouts_are_not_spoken_of(source, tmp_path):
    assert get("int8_dynamic").serving(get("int8_dynamic").Options()) == ""
    card = (made(source, tmp_path / "out", "int8_dynamic", bits=8, group_size=-1) / "README.md").read_text()
    assert "vLLM" not in card
