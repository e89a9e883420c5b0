"""Whole models through the pipeline: every family, every method, interrupted, refused, and read back."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import toys
from filelock import FileLock
from quantizing import quantize_events

from lowmem.errors import BadInput, Cancelled, CorruptModel, DiskFull, DoesNotFit, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.kernels.packing import from_awq, from_gptq
from lowmem.machine.budget import MemoryBudget
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.source import read_spec
from lowmem.quant import METHODS, get, prepared, shards
from lowmem.quant.calibration import Calibration, token_samples

FEW = Calibration(samples=3, length=32)
GRID = [name for name in METHODS if name not in ("int8_dynamic", "bnb")]
"""Methods with groups of codes; the others are in test_quant_own_layouts.py."""

CALIBRATED = [name for name in METHODS if get(name).calibrated]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All toys as folders, which tests only read."""
    root = tmp_path_factory.mktemp("toys")
    for name in toys.NAMES:
        toys.save_toy(name, root / name)
    return root


def events(folder: Path, out: Path, method: str = "rtn", **given: Any) -> Iterator[Step | Receipt]:
    keywords = {name: given.pop(name) for name in ("cancel", "budget", "restart") if name in given}
    calibration = given.pop("calibration", FEW)
    return quantize_events(folder, out, method, {"group_size": 32} | given, calibration, **keywords)


def quantize(folder: Path, out: Path, method: str = "rtn", **given: Any) -> Receipt:
    *steps, receipt = events(folder, out, method, **given)
    assert isinstance(receipt, Receipt)
    done = [step.done for step in steps if isinstance(step, Step)]
    assert done == sorted(done)
    return receipt


def dense(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a quantized checkpoint in fp32, packed layers multiplied out."""
    config = json.loads((folder / "quantize_config.json").read_text())
    result, packed = {}, {}
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint.tensors:
            owner, _, part = name.rpartition(".")
            if part in ("qweight", "qzeros", "scales", "g_idx"):
                packed.setdefault(owner, {})[part] = checkpoint.read(name)
            else:
                result[name] = checkpoint.read(name).float()
    for owner, parts in packed.items():
        v2 = config.get("checkpoint_format") == "gptq_v2"
        weight = from_awq(parts) if config["quant_method"] == "awq" else from_gptq(parts, config["bits"], v2)
        # GPT-2's layers lie the other way round.
        result[f"{owner}.weight"] = weight.dequantize().t() if ".c_" in owner else weight.dequantize()
    return result


def restored(name: str, folder: Path) -> torch.nn.Module:
    """The toy with the checkpoint's weights."""
    model = toys.fresh(name)
    missing = model.load_state_dict(dense(folder), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= set(model._tied_weights_keys or ())
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([toys.prompt(48, seed=7)])).logits[0]


def divergence(name: str, folder: Path) -> float:
    """Mean KL of the checkpoint's predictions from the toy's."""
    original, quantized = (logits(model).log_softmax(-1) for model in (toys.toy(name), restored(name, folder)))
    return float((original.exp() * (original - quantized)).sum(-1).mean())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "README.md"}


@pytest.mark.parametrize("family", toys.NAMES)
@pytest.mark.parametrize("method", GRID)
def test_every_family_by_every_method(family: str, method: str, saved: Path, tmp_path: Path) -> None:
    receipt = quantize(saved / family, tmp_path / "out", method)
    blocks = read_spec(str(saved / family)).blocks
    assert len(receipt.details["losses"]) == sum(len(blocks[index].linears) for index in range(2))
    assert receipt.disk_bytes == receipt.details["predicted_bytes"]
    assert receipt.details["bits_per_quantized_weight"] < 6
    assert divergence(family, tmp_path / "out") < 0.35
    assert not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "phi"])
def test_calibration_pays(family: str, saved: Path, tmp_path: Path) -> None:
    """On the layers' own measure; toys are too random for their predictions to tell."""
    calibration = Calibration(samples=8, length=64)
    losses = {
        method: quantize(saved / family, tmp_path / method, method, calibration=calibration, bits=4).details["loss"]
        for method in GRID
    }
    assert losses["gptq"] < 0.6 * losses["rtn"]
    assert losses["awq"] < losses["rtn"]
    assert losses["hqq"] < losses["rtn"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "gemma3", "phi", "phi3"])
def test_folded_factors_change_no_output(family: str, saved: Path, tmp_path: Path) -> None:
    """With 8 bits nothing but the folding of channel factors into norms and layers could move the predictions."""
    quantize(saved / family, tmp_path / "out", "gptq", bits=8, scale_channels=True)
    assert divergence(family, tmp_path / "out") < 3e-3
    norms = [name for name in dense(tmp_path / "out") if "norm" in name or "ln_" in name]
    original = toys.toy(family).state_dict()
    moved = [n for n in norms if not torch.allclose(dense(tmp_path / "out")[n], original[n], atol=1e-2)]
    assert moved


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_widths_and_layouts(bits: int, symmetric: bool, saved: Path, tmp_path: Path) -> None:
    receipt = quantize(saved / "llama", tmp_path / "out", "gptq", bits=bits, symmetric=symmetric, order="activation")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 32, symmetric, True)
    assert divergence("llama", tmp_path / "out") < {2: 8, 3: 2, 4: 0.7, 8: 3e-3}[bits]
    assert bool(receipt.notes) == (bits == 2)


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi"])
def test_a_checkpoint_computes_what_its_quantization_saw(method: str, family: str, saved: Path, tmp_path: Path) -> None:
    """The inputs of the second block, written while quantizing, are those of the model that is read back."""
    stopped = events(saved / family, tmp_path / "out", method)
    next(step for step in stopped if "Block 2" in step.note)
    part = tmp_path / "out.part"
    seen = torch.frombuffer(bytearray((part / "block-1.bin").read_bytes()), dtype=torch.float32)
    stopped.close()
    quantize(saved / family, tmp_path / "out", method)
    samples = torch.tensor(token_samples(toys.tokenizer(), FEW, toys.CONTEXT))
    with torch.no_grad():
        states = restored(family, tmp_path / "out")(input_ids=samples, output_hidden_states=True).hidden_states
    torch.testing.assert_close(seen.view(states[1].shape), states[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", GRID)
@pytest.mark.parametrize("moment", ["Copying lm_head", "Block 1 of 2", "Block 2 of 2", "Block 2 of 2, mlp.up_proj"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    method: str, moment: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)  # several, so that one is cut in the middle
    quantize(saved / "llama", tmp_path / "whole", method)
    if get(method).calibrated:
        moment = moment.replace("mlp.up_proj", "inputs of down_proj")
    running = events(saved / "llama", tmp_path / "out", method)
    next(step for step in running if moment in step.note)
    # What is on disk at this moment is what a killed process leaves: its buffers are lost.
    shutil.copytree(tmp_path / "out.part", tmp_path / "left")
    running.close()
    shutil.rmtree(tmp_path / "out.part")
    (tmp_path / "left").rename(tmp_path / "out.part")
    receipt = quantize(saved / "llama", tmp_path / "out", method)
    assert receipt.details["resumed_blocks"] == (1 if "Block 2" in moment else 0)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_a_run_goes_on_with_another_number_of_threads_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        quantize(saved / "llama", tmp_path / "whole", "gptq")
        running = events(saved / "llama", tmp_path / "out", "gptq")
        next(step for step in running if "Block 2" in step.note)
        running.close()
        torch.set_num_threads(1)
        running = events(saved / "llama", tmp_path / "out", "gptq")
        computed = {torch.get_num_threads() for step in running if "Block" in getattr(step, "note", "")}
        assert computed == {2}  # as it began
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [("bits", "bits was 4, now 3"), ("text", "the calibration text changed"), ("file", "the model's files changed")],
)
def test_a_run_that_cannot_go_on_is_asked_about_and_never_deleted(
    change: str, named: str, saved: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(saved / "llama", tmp_path / "source")
    running = events(source, tmp_path / "out", "gptq")
    next(step for step in running if "Block 2" in step.note)
    running.close()
    given: dict[str, Any] = {"bits": 3} if change == "bits" else {}
    if change == "text":
        given["calibration"] = Calibration(samples=4, length=32)
    if change == "file":
        shutil.copyfile(saved / "mistral" / "model.safetensors", source / "model.safetensors")
    left = contents(tmp_path / "out.part")
    with pytest.raises(BadInput, match=rf"1 finished blocks .*{named}") as caught:
        list(events(source, tmp_path / "out", "gptq", **given))
    assert "--restart" in caught.value.hint
    assert "another output folder" in caught.value.hint
    assert contents(tmp_path / "out.part") == left
    assert quantize(source, tmp_path / "elsewhere", "gptq", **given).details["resumed_blocks"] == 0


def test_other_settings_or_another_source_start_afresh(saved: Path, tmp_path: Path) -> None:
    source = shutil.copytree(saved / "llama", tmp_path / "source")
    for number, change in enumerate(("bits", "text", "file")):
        running = events(source, tmp_path / f"out{number}", "gptq")
        next(step for step in running if "Block 2" in step.note)
        running.close()
        given: dict[str, Any] = {"bits": 3} if change == "bits" else {}
        if change == "text":
            given["calibration"] = Calibration(samples=4, length=32)
        if change == "file":
            shutil.copyfile(saved / "mistral" / "model.safetensors", source / "model.safetensors")
        made = quantize(source, tmp_path / f"out{number}", "gptq", restart=True, **given)
        assert made.details["resumed_blocks"] == 0


def test_the_result_is_a_model_folder(saved: Path, tmp_path: Path) -> None:
    receipt = quantize(saved / "qwen2", tmp_path / "out", "awq")
    out = tmp_path / "out"
    names = {file.name for file in out.iterdir()}
    assert {"model.safetensors", "config.json", "quantize_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".tmp", ".part", ".new"))]
    assert not names & {"lock", "journal.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["version"], quantization["zero_point"]) == ("awq", "gemm", True)
    stored = safetensors.torch.load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.int32, torch.float16}
    assert "model.layers.0.self_attn.q_proj.bias" in stored
    assert "model.layers.0.self_attn.q_proj.g_idx" not in stored
    card = (out / "README.md").read_text()
    assert "3 x 32 tokens of manual" in card
    assert f"{receipt.details['bits_per_quantized_weight']:.2f}" in card
    compile(receipt.snippet, "snippet", "exec")


def test_half_precision_is_kept_as_it_is(tmp_path: Path) -> None:
    model = toys.fresh("llama").to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "model")
    toys.tokenizer().save_pretrained(tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", "gptq")
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_stop_leaves_no_output_and_what_is_done(method: str, saved: Path, tmp_path: Path) -> None:
    cancel = CancelToken()
    running = events(saved / "llama", tmp_path / "out", method, cancel=cancel)
    next(step for step in running if "Block 2" in step.note)
    cancel.set()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        for _ in running:
            pass
    assert time.monotonic() - started < 1
    assert not (tmp_path / "out").exists()
    assert quantize(saved / "llama", tmp_path / "out", method).details["resumed_blocks"] == 1


def refused(kind: type[Exception], said: str, *arguments: Any, **given: Any) -> None:
    """The sentence is `said`, and nothing was written."""
    out = arguments[1]
    before = contents(out) if out.is_dir() else None
    with pytest.raises(kind, match=said):
        for _ in events(*arguments, **given):
            pass
    assert (contents(out) if out.is_dir() else None) == before


def test_a_quantized_model_is_refused(saved: Path, tmp_path: Path) -> None:
    quantize(saved / "llama", tmp_path / "once")
    refused(Unsupported, "already quantized with gptq", tmp_path / "once", tmp_path / "twice")
    assert not (tmp_path / "twice.part").exists()


def test_an_unknown_family_is_refused_before_any_work(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blossom"}))
    refused(Unsupported, "transformers does not know .*'blossom'", folder, tmp_path / "out")
    assert not (tmp_path / "out.part").exists()


def test_a_short_calibration_text_is_refused_with_its_length(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 20)
    calibration = Calibration(str(tmp_path / "text.txt"), samples=4, length=64)
    refused(
        BadInput, r"text.txt has 100 tokens; 4 samples of 64 need 256", saved / "llama", tmp_path / "out",
        method="gptq", calibration=calibration,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_numbers_are_named(
    bad: float, name: str, method: str, saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved / "llama", tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights[name].view(-1)[5] = bad
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(CorruptModel, f"{name} contains NaN or infinite values", folder, tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()


def test_values_beyond_fp16_stay_in_fp32(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "llama", tmp_path / "model")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    quantize(folder, tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["model.norm.weight"], weights["model.norm.weight"])


def test_a_group_that_does_not_divide_is_refused_with_those_that_do(saved: Path, tmp_path: Path) -> None:
    refused(BadInput, r"Groups of 48 do not divide the 64 inputs of .*_proj.*Use 32, 64 or -1",
            saved / "llama", tmp_path / "out", group_size=48)  # fmt: skip


def test_a_full_disk_is_refused_with_both_numbers(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "disk_free_bytes", lambda _: 12_345)
    refused(
        DiskFull,
        "needs .* MB of disk space, but only 12.3 KB is free",
        saved / "llama",
        tmp_path / "out",
    )


def test_a_disk_that_fills_up_keeps_what_is_done(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = shards.Shards.add, []

    def add(self: Any, tensors: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        original(self, tensors)

    monkeypatch.setattr(shards.Shards, "add", add)
    refused(DiskFull, "The disk is full: out is unfinished at block 2", saved / "llama", tmp_path / "out")
    monkeypatch.setattr(shards.Shards, "add", original)
    assert quantize(saved / "llama", tmp_path / "out").details["resumed_blocks"] == 1


def test_a_budget_below_the_prediction_is_refused(saved: Path, tmp_path: Path) -> None:
    refused(DoesNotFit, "is estimated to take .* the budget is 10.0 MB", saved / "llama", tmp_path / "out",
            method="gptq", budget=MemoryBudget(ram=10_000_000))  # fmt: skip


def test_an_output_that_is_there_is_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    refused(BadInput, "The folder .*out already exists", saved / "llama", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    refused(BadInput, "The file .*file already exists", saved / "llama", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    quantize(saved / "llama", tmp_path / "empty")


def test_an_output_that_another_process_writes_is_refused(saved: Path, tmp_path: Path) -> None:
    running = events(saved / "llama", tmp_path / "out")
    next(running)
    with FileLock(tmp_path / "elsewhere.lock"):
        refused(BadInput, "out is being written by another process", saved / "llama", tmp_path / "out")
    running.close()


def test_a_folder_in_the_way_is_left_alone(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.txt").write_text("mine")
    refused(CorruptModel, "out.part is in the way", saved / "llama", tmp_path / "out")
    assert (tmp_path / "out.part" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["journal", "shard", "activations"])
def test_a_damaged_unfinished_folder_is_refused(damage: str, saved: Path, tmp_path: Path) -> None:
    running = events(saved / "llama", tmp_path / "out", "gptq")
    next(step for step in running if "Block 2" in step.note)
    running.close()
    part = tmp_path / "out.part"
    if damage == "journal":
        (part / "journal.json").write_text((part / "journal.json").read_text()[:100])
    if damage == "shard":
        with (part / "shard-0.tmp").open("r+b") as file:
            file.truncate(2000)
    if damage == "activations":
        with (part / "block-1.bin").open("r+b") as file:
            file.seek(100)
            file.write(b"\1\2\3\4")
    said = {"journal": "journal .* cannot be read", "shard": "shard-0.tmp .* has 2,000 bytes", "activations": "damaged"}
    refused(CorruptModel, said[damage], saved / "llama", tmp_path / "out", method="gptq")
