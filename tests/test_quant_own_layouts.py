"""Dynamic int8 and bitsandbytes as checkpoints: made, loaded without the original, and the same as loading in int8 or NF4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from conftest import machine
from quantizing import quantize_events
from safetensors.torch import load_file, save_file

from lowmem.errors import BadInput, CorruptModel, Unsupported
from lowmem.events import CancelToken, Receipt, drain
from lowmem.kernels import packed_linear
from lowmem.kernels.packed_linear import PackedLinear
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import weight_bytes
from lowmem.planning.planner import plan
from lowmem.planning.precision import storage_refusal
from lowmem.runtime.loader import load

pytest.importorskip("bitsandbytes")

IDS = torch.tensor([toys.prompt(40, seed=3)])
INT8, LLM_INT8, NF4 = ("int8_dynamic", {}), ("bnb", {"bits": 8}), ("bnb", {})
CASES = [(INT8, "int8"), (LLM_INT8, "bnb8"), (NF4, "nf4")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toys whose rows are whole blocks of 64, of weights that fp16 holds exactly: what is kept loses nothing."""
    root, made = tmp_path_factory.mktemp("own"), {}
    for name in ("llama", "gpt2", "qwen2"):
        config = toys.config(name)
        config.update({"n_inner" if name == "gpt2" else "intermediate_size": 128})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = (parameter.data * (10 if parameter.dim() > 1 else 1)).half().float()
        model.save_pretrained(root / name)
        toys.tokenizer().save_pretrained(root / name)
        made[name] = root / name
    return made


def quantize(folder: Path, out: Path, case: tuple[str, dict[str, Any]]) -> Receipt:
    *_, receipt = quantize_events(folder, out, *case)
    assert isinstance(receipt, Receipt)
    return receipt


def loaded(folder: Path, precision: str = "auto") -> Any:
    hardware = machine()
    made = plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(context=128, precision=precision))
    return drain(load(made, folder, CancelToken())).model


@pytest.mark.parametrize(("case", "precision"), CASES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_a_saved_model_is_the_one_that_loading_in_that_precision_gives(
    folders: dict[str, Path], tmp_path: Path, name: str, case: tuple[str, dict[str, Any]], precision: str
) -> None:
    receipt = quantize(folders[name], tmp_path / "out", case)
    assert 0 < receipt.details["loss"] < 0.02
    assert receipt.disk_bytes == pytest.approx(receipt.details["predicted_bytes"], abs=1000)
    torch.testing.assert_close(
        loaded(tmp_path / "out")(IDS).logits, loaded(folders[name], precision)(IDS).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("case", "precision"), CASES, ids=str)
def test_the_weights_are_counted_as_those_of_the_precision(
    folders: dict[str, Path], tmp_path: Path, case: tuple[str, dict[str, Any]], precision: str
) -> None:
    quantize(folders["llama"], tmp_path / "out", case)
    spec, original = read_spec(str(tmp_path / "out")), read_spec(str(folders["llama"]))
    assert spec.parameters == original.parameters
    assert len(spec.packed_layers) == 14
    # The description of each 4-bit layer, and its table of codes.
    extra = 14 * 1400 if precision == "nf4" else 14 if precision == "bnb8" else 0
    assert weight_bytes(spec, "stored", "fp32") == pytest.approx(weight_bytes(original, precision, "fp32"), abs=extra)


@pytest.mark.parametrize("options", [{}, {"type": "fp4", "double": False}, {"bits": 8}], ids=str)
def test_transformers_itself_loads_what_bitsandbytes_method_saved(
    folders: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    quantize(folders["llama"], tmp_path / "out", ("bnb", options))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    kinds = {type(module).__name__ for module in theirs.modules()}
    assert ("Linear8bitLt" if options.get("bits") == 8 else "Linear4bit") in kinds
    ours = loaded(tmp_path / "out")(IDS).logits
    assert torch.nn.functional.cosine_similarity(theirs(IDS).logits.float(), ours, dim=-1).min() > 0.995


def test_int8_runs_from_its_codes_where_there_is_no_kernel(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(folders["llama"], tmp_path / "out", INT8)
    monkeypatch.setattr(packed_linear, "has_int8_kernels", lambda: False)
    layer = loaded(tmp_path / "out").model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(layer.dense().t(), stored[name].float() * stored[f"{name}_scale"], rtol=1e-6, atol=0)


def test_codes_of_a_processor_with_wider_products_are_rounded_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem.kernels.int8_linear.largest_code", lambda: 127)
    quantize(folders["llama"], tmp_path / "out", INT8)
    wide = loaded(tmp_path / "out")(IDS).logits
    monkeypatch.setattr("lowmem.kernels.int8_linear.largest_code", lambda: 63)
    monkeypatch.setattr("lowmem.kernels.packed_linear.largest_code", lambda: 63)
    again = loaded(tmp_path / "out")(IDS).logits
    assert torch.nn.functional.cosine_similarity(wide, again, dim=-1).min() > 0.95


def test_a_description_that_is_another_layers_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize(folders["llama"], tmp_path / "out", NF4)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    one, other = (f"model.layers.0.mlp.{layer}_proj.weight.quant_state.bitsandbytes__nf4" for layer in ("up", "down"))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, file)
    with pytest.raises(CorruptModel, match=r"mlp\.\w+_proj does not contain"):
        loaded(tmp_path / "out")


@pytest.mark.parametrize("weights", [{"strategy": "group"}, {"strategy": "channel", "symmetric": False}, None])
def test_other_layouts_of_compressed_tensors_run_dequantized(
    folders: dict[str, Path], tmp_path: Path, weights: dict[str, Any] | None
) -> None:
    quantize(folders["llama"], tmp_path / "out", INT8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scheme = config["quantization_config"]["config_groups"]["group_0"]
    scheme["weights"] = weights and scheme["weights"] | weights
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    spec = read_spec(str(tmp_path / "out"))
    assert (storage_refusal(spec), spec.quantization, spec.dequantized) == ("", "", "INT8")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("int8_dynamic", {"bits": 4}), "Bits is 4"),
        (("int8_dynamic", {"group_size": 64}), "Group size is 64"),
        (("int8_dynamic", {"symmetric": False}), "no zero points"),
        (("bnb", {"bits": 3}), "4 and 8 bits, not 3"),
        (("bnb", {"group_size": 32}), "no groups of 32"),
        (("bnb", {"symmetric": True}), "no symmetric option"),
        (("bnb", {"type": "nf3"}), "there is no 'nf3'"),
    ],
)
def test_options_that_a_method_does_not_have(
    folders: dict[str, Path], tmp_path: Path, case: tuple[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        quantize(folders["llama"], tmp_path / "out", case)


def test_a_quantized_model_is_not_quantized_again(folders: dict[str, Path], tmp_path: Path) -> None:
    quantize(folders["llama"], tmp_path / "once", NF4)
    with pytest.raises(Unsupported, match="already quantized"):
        quantize(tmp_path / "once", tmp_path / "twice", INT8)
