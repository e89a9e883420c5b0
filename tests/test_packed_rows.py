"""Embeddings and output heads in 8, 6 and 4 bits: packed in files and in memory, once where they are tied."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
import transformers
from conftest import machine
from quantizing import quantize_events
from safetensors.torch import load_file

from lowmem.errors import BadInput, CorruptModel
from lowmem.events import CancelToken, Receipt, drain
from lowmem.kernels import packed_rows
from lowmem.kernels.layouts import rows_bytes
from lowmem.kernels.packed_rows import PackedEmbedding, PackedHead, PackedRows
from lowmem.machine.budget import MemoryBudget
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.packed_rows import dequantize_rows, pack_rows, unpack_rows
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import loading_peak, weight_bytes
from lowmem.planning.planner import plan
from lowmem.quant.request import QuantizeRequest
from lowmem.runtime.loader import load

BITS = (8, 6, 4)
LOSSES = {8: 1e-4, 6: 1e-3, 4: 2e-2}
"""Squared error of random weights over their squares."""

IDS = torch.tensor([toys.prompt(24, seed=3)])


def table(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, PackedRows]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight, PackedRows.quantized((rows, columns), lambda start, stop: weight[start:stop], bits)


def dense(rows: PackedRows) -> torch.Tensor:
    return dequantize_rows(rows.codes, rows.scales, rows.bits)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_packing(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.arange(low, high, dtype=torch.int16).to(torch.int8).repeat(5, 4)
    packed = pack_rows(codes.clone(), bits)
    assert packed.nbytes == codes.numel() * bits // 8
    assert torch.equal(unpack_rows(packed, bits).to(torch.int16), codes.to(torch.int16))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [64, 576, 640, 36])
def test_a_table_takes_what_is_counted_and_loses_little(bits: int, columns: int) -> None:
    weight, rows = table(3000, columns, bits)
    assert rows.codes.nbytes + rows.scales.nbytes == rows_bytes(3000, columns, bits)
    assert float((dense(rows) - weight).square().sum() / weight.square().sum()) < LOSSES[bits]
    ids = torch.tensor([[5, 2999, 0], [5, 7, 7]])
    assert torch.equal(rows.gather(ids, torch.float32), dense(rows)[ids])


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_head_multiplies_by_the_table(monkeypatch: pytest.MonkeyPatch, vnni: bool, bits: int, count: int) -> None:
    monkeypatch.setattr(packed_rows, "has_vnni", lambda: vnni)
    _, rows = table(5000, 96, bits)
    x, bias = torch.randn(count, 96), torch.randn(5000)
    x[0] *= 100
    found, expected = PackedHead(rows, bias, torch.float32)(x), x @ dense(rows).t() + bias
    assert (found - expected).norm(dim=1).div(expected.norm(dim=1)).max() < 1e-3
    assert not PackedHead(rows, bias, torch.float32)(torch.zeros(2, 96)).sub(bias).any()


def quantized(name: str, root: Path, method: str, bits: int, tied: bool) -> tuple[Path, Receipt]:
    config = toys.config(name)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    original = root / "original"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(original)
    toys.tokenizer().save_pretrained(original)
    options = {"group_size": -1} if method in ("int8_dynamic", "bnb") else {"group_size": 32}
    options |= {"bits": 8} if method == "bnb" else {}
    *_, receipt = quantize_events(original, root / "made", method, options, embedding_bits=bits)
    assert isinstance(receipt, Receipt)
    return root / "made", receipt


def loaded(folder: Path, precision: str = "stored") -> transformers.PreTrainedModel:
    chosen = plan(read_spec(str(folder)), machine(), MemoryBudget(), Goal(precision=precision, backend="torch"))
    return drain(load(chosen, folder, CancelToken())).model


@pytest.mark.parametrize("bits", [*BITS, 16])
@pytest.mark.parametrize(("name", "method", "tied"), [("gemma3", "rtn", True), ("llama", "hqq", False)])
def test_results_hold_the_table_packed_and_once(tmp_path: Path, name: str, method: str, tied: bool, bits: int) -> None:
    folder, receipt = quantized(name, tmp_path, method, bits, tied)
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model, spec = loaded(folder), read_spec(str(folder))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert receipt.details["embedding_bits"] == bits
    if bits == 16:
        assert not [name for name in stored if name.endswith("_codes")]
        return
    tables = {name for name in stored if name.endswith("_codes")}
    assert tables == {"model.embed_tokens.weight_codes"} | (set() if tied else {"lm_head.weight_codes"})
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedHead)
    assert (head.codes is embedding.codes) == tied
    size = rows_bytes(toys.VOCABULARY, 64, bits)
    counted = [one for one in spec.tensors if one.packed_rows]
    assert [one.nbytes for one in counted] == [size] * len(tables)
    assert weight_bytes(spec, "stored", "fp32") <= loading_peak(spec, "stored", "fp32")
    with Checkpoint(folder) as checkpoint:
        weight = checkpoint.read("model.embed_tokens.weight")
        output = weight if tied else checkpoint.read("lm_head.weight")
    factor = getattr(
        transformers.AutoModelForCausalLM.from_config(model.config).get_input_embeddings(), "embed_scale", 1.0
    )
    torch.testing.assert_close(embedding(IDS), weight[IDS] * float(factor))
    x = torch.randn(3, 64)
    torch.testing.assert_close(head(x), x @ output.t(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "int8_dynamic"])
def test_every_method_takes_tables(tmp_path: Path, method: str) -> None:
    folder, _ = quantized("llama", tmp_path, method, 6, tied=True)
    model, original = loaded(folder), loaded(tmp_path / "original", "fp32")
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    cosine = torch.nn.functional.cosine_similarity(model(IDS).logits, original(IDS).logits, dim=-1)
    assert cosine.min() > 0.9


def test_other_bits_are_refused_by_name() -> None:
    with pytest.raises(BadInput, match="5 bits"):
        QuantizeRequest.validated("demo", "rtn", embedding_bits=5)


def test_a_table_that_config_json_does_not_describe_is_corrupt(tmp_path: Path) -> None:
    folder, _ = quantized("llama", tmp_path, "rtn", 4, tied=True)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["packed_rows"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptModel, match=r"embed_tokens\.weight"):
        read_spec(str(folder))


_PEAK = """
import sys
from pathlib import Path
import torch
from lowmem.events import CancelToken
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import probe
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime.loader import load

def held(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

folder = Path(sys.argv[1])
goal = Goal(precision=sys.argv[2], backend="torch", device="cpu", context=64)
loading = load(plan(read_spec(str(folder)), probe(), MemoryBudget(), goal), folder, CancelToken())
next(loading)
before = held("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
try:
    while True:
        next(loading)
except StopIteration as done:
    model = done.value.model
with torch.inference_mode():
    model(input_ids=torch.tensor([[1, 2, 3]]), logits_to_keep=1)
print(held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tied_table_of_262144_rows_is_in_memory_once(tmp_path: Path) -> None:
    rows, columns = 262_144, 128
    config = transformers.Gemma3TextConfig(
        vocab_size=rows, hidden_size=columns, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    original = tmp_path / "original"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(original)
    toys.tokenizer().save_pretrained(original)
    *_, _ = quantize_events(original, tmp_path / "made", "rtn", {"group_size": 32}, embedding_bits=4)
    for folder, precision, bits in ((original, "int8", 8), (tmp_path / "made", "stored", 4)):
        ran = subprocess.run(
            [sys.executable, "-c", _PEAK, str(folder), precision], capture_output=True, text=True, check=True
        )
        size, peak = rows_bytes(rows, columns, bits), int(ran.stdout)
        assert size < peak < size + 60_000_000  # ONNX Runtime, the blocks, rows at work, logits; fp32 would take 134 MB


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, _ = quantized("llama", tmp_path, "gptq", 8, tied=True)
    original, out = tmp_path / "original", tmp_path / "again"
    events = quantize_events(original, out, "gptq", {"group_size": 32}, embedding_bits=8)
    next(event for event in events if "Block 2" in str(getattr(event, "note", "")))
    events.close()  # type: ignore[attr-defined]
    *_, receipt = quantize_events(original, out, "gptq", {"group_size": 32}, embedding_bits=8)
    assert isinstance(receipt, Receipt)
    assert receipt.details["resumed_blocks"] == 1
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
