"""Fused graphs: equal to the model with and without cache, streamed from any checkpoint, behind the decode loop."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import packed_toys
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from lowmem.__main__ import main
from lowmem.errors import BadInput, LowMemError, Unsupported
from lowmem.events import CancelToken, Receipt
from lowmem.export import parity, run
from lowmem.export.linears import rounding
from lowmem.export.request import ExportRequest
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.models.source import read_spec
from lowmem.planning import exported
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import DATA, GRAPH, PREFILL, read_manifest
from lowmem.runtime.onnx.model import OnnxModel

FUSED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi3")


def export(source: Path, out: Path, **options: object) -> Receipt:
    *_, receipt = run.export_model(ExportRequest(str(source), out, ExportOptions(**options)))  # type: ignore[arg-type]
    assert isinstance(receipt, Receipt)
    return receipt


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One fp32 graph of each family, and an int8 one of the first, with the models they came from."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    for name in FUSED:
        source = toys.save_toy(name, root / name)
        export(source, root / f"{name}-fp32", precision="fp32")
        found[name] = root / f"{name}-fp32"
    export(root / "llama", root / "llama-int8", precision="int8")
    return found | {"int8": root / "llama-int8", "source": root / "llama"}


@pytest.mark.parametrize("family", FUSED)
def test_logits_are_the_models(folders: dict[str, Path], family: str) -> None:
    ids = torch.tensor([toys.prompt(40)])
    wanted = toys.toy(family)(input_ids=ids).logits
    graph = OnnxModel(folders[family])
    assert torch.allclose(graph(ids).logits, wanted, atol=1e-4)
    cache = graph.make_cache(1, 40)
    parts = [
        graph(ids[:, start:end], past_key_values=cache).logits for start, end in ((0, 25), (25, 26), (26, 39), (39, 40))
    ]
    assert torch.allclose(torch.cat(parts, 1), wanted, atol=1e-4)


@pytest.mark.parametrize("renamed", [("model.", ""), ("lm_head.", "model.lm_head.")])
def test_weights_named_with_or_without_the_base_models_prefix_are_found(
    folders: dict[str, Path], tmp_path: Path, renamed: tuple[str, str]
) -> None:
    file = toys.save_toy("llama", tmp_path / "m") / "model.safetensors"
    save_file({name.replace(*renamed): tensor for name, tensor in load_file(file).items()}, file)
    export(tmp_path / "m", tmp_path / "out", precision="fp32")
    ids = torch.tensor([toys.prompt(20)])
    assert torch.equal(OnnxModel(tmp_path / "out")(ids).logits, OnnxModel(folders["llama"])(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [16, 512])
def test_rows_of_different_length_are_decoded_as_torch_does(folders: dict[str, Path], family: str, chunk: int) -> None:
    prompts = [toys.prompt(length, seed=length) for length in (3, 20, 45)]
    options = GenerateOptions(greedy=True, max_new_tokens=12, prefill_chunk=chunk, num_return_sequences=2)

    def answers(model: object) -> list[Tokens]:
        events = decode(model, prompts, options, eos_ids=frozenset({7}), cancel=CancelToken())  # type: ignore[arg-type]
        return [event for event in events if isinstance(event, Tokens)]

    assert answers(OnnxModel(folders[family])) == answers(toys.toy(family))


def test_without_a_cache_the_answer_is_the_same(folders: dict[str, Path]) -> None:
    graph, prompts = OnnxModel(folders["llama"]), [toys.prompt(9)]

    def answer(use_cache: bool) -> list[object]:
        options = GenerateOptions(greedy=True, max_new_tokens=6, use_cache=use_cache)
        events = decode(graph, prompts, options, eos_ids=frozenset(), cancel=CancelToken())  # type: ignore[arg-type]
        return [event for event in events if isinstance(event, Tokens)]

    assert answer(True) == answer(False)


def test_a_window_reads_its_end_anew(folders: dict[str, Path]) -> None:
    options = GenerateOptions(greedy=True, max_new_tokens=60, window=32, sinks=0)
    events = decode(OnnxModel(folders["llama"]), [toys.prompt(40)], options, eos_ids=frozenset(), cancel=CancelToken())  # type: ignore[arg-type]
    assert sum(isinstance(event, Tokens) for event in events) == 60


def test_an_int8_cache_is_refused_in_a_sentence(folders: dict[str, Path]) -> None:
    options = GenerateOptions(cache_type="int8", max_new_tokens=2)
    with pytest.raises(Unsupported, match="fp32"):
        next(decode(OnnxModel(folders["llama"]), [[1, 2]], options, eos_ids=frozenset(), cancel=CancelToken()))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_smaller_precisions_keep_their_gate(tmp_path: Path, precision: str) -> None:
    receipt = export(toys.save_toy("qwen3", tmp_path / "m"), tmp_path / "out", precision=precision)
    found = receipt.details["parity"]
    assert found["passed"]
    assert max(found["prefill"]["kl"], found["decode"]["kl"]) <= parity.GATES[precision]
    assert receipt.disk_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.onnx*"))


@pytest.mark.parametrize(("bits", "group", "columns"), [(8, 64, 96), (8, 64, 128), (4, 32, 64)])
def test_weights_come_back_within_half_a_step(bits: int, group: int, columns: int) -> None:
    """Where groups do not divide a row, its last group is shorter."""
    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    rounded = rounding(bits, group, CancelToken())(weight)
    steps = rounded.scales.float()[:, rounded.groups.long()]
    error = (rounded.dequantize() - weight).abs() / steps
    assert float(error.mean()) < 0.3
    assert bits == 4 or float(error.max()) < 0.6  # scales are rounded, too


@pytest.mark.parametrize(
    "recipe",
    [
        packed_toys.Recipe(),
        packed_toys.Recipe(layout="gptq_v2", symmetric=False, act_order=True),
        packed_toys.Recipe(layout="gemm", symmetric=False),
        packed_toys.Recipe(bits=3, group=16),
        packed_toys.Recipe(bits=8),
    ],
    ids=str,
)
def test_codes_are_taken_over_without_a_second_rounding(tmp_path: Path, recipe: packed_toys.Recipe) -> None:
    dense = packed_toys.save("llama", tmp_path / "m", recipe)
    precision = "int8" if recipe.bits == 8 else "int4"
    export(tmp_path / "m", tmp_path / "out", precision=precision, fast_prefill="off")
    ids = torch.tensor([toys.prompt(30)])
    graph = OnnxModel(tmp_path / "out")
    # What remains is the rounding of activations and of the head's weights to eight bits.
    wanted, found = (torch.log_softmax(model(ids).logits, -1) for model in (dense, graph))
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 0.05


def test_the_size_is_predicted(tmp_path: Path) -> None:
    source = toys.save_toy("llama", tmp_path / "m")
    spec = read_spec(str(source))
    for precision in ("fp32", "int8", "int4"):
        export(source, tmp_path / precision, precision=precision)
        data = (tmp_path / precision / DATA).stat().st_size
        predicted = exported.disk_bytes(spec, precision)
        pages = 64 * 4096  # every weight begins on a page, which a real model does not notice
        assert predicted <= data + 4096 < predicted + pages


@pytest.mark.parametrize("options", [{}, {"fused": False}])
def test_the_program_runs_in_fp16(tmp_path: Path, options: dict[str, bool]) -> None:
    export(toys.save_toy("llama", tmp_path / "m"), tmp_path / "out", precision="fp16", **options)
    done = subprocess.run(
        [sys.executable, "run.py", "Hello", "5"], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_program_runs_for_a_model_with_its_vocabulary_in_other_files(tmp_path: Path) -> None:
    source = toys.save_toy("llama", tmp_path / "m")
    core = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(core["model"]["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "!", "bos_token": "!", "eos_token": "!"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    export(source, tmp_path / "out", precision="fp32")
    done = subprocess.run(
        [sys.executable, "run.py", "Hello", "5"], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_program_runs_with_nothing_else(folders: dict[str, Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; sys.argv = ['run.py', 'Hello', '5']\n"
    )
    code += "import runpy; runpy.run_path('run.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folders["llama"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ids = list(b"Hello")
    options = GenerateOptions(greedy=True, max_new_tokens=5)
    events = decode(toys.toy("llama"), [ids], options, eos_ids=frozenset({toys.EOS}), cancel=CancelToken())
    made = [event.ids[0] for event in events if isinstance(event, Tokens)]
    assert done.stdout.strip("\n") == toys.tokenizer().decode([t for t in made if t != toys.EOS]).strip("\n")


def test_the_command_line_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toys.save_toy("llama", tmp_path / "m")
    for out, flags in (("a", ["--precision", "int4", "--group-size", "16"]), ("b", ["--no-fused", "--optimise"])):
        assert main(["export", str(source), str(tmp_path / out), *flags, "--json"]) == 0
        receipt = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert receipt["details"]["kind"] == ("fused" if out == "a" else "decoder")
    assert main(["export", str(source), str(tmp_path / "a")]) == 3
    assert "already exists" in capsys.readouterr().err


def test_a_graph_that_fails_the_parity_check_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parity.GATES, "int4", 1e-9)
    with pytest.raises(Unsupported, match=r"failed the parity check.*KL 0\.\d+"):
        export(toys.save_toy("llama", tmp_path / "m"), tmp_path / "out", precision="int4")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()
    assert read_manifest(tmp_path / "failed" / "out").parity["passed"] is False


def test_stop_ends_an_export_and_leaves_nothing(tmp_path: Path) -> None:
    cancel = CancelToken()
    events = run.export_model(ExportRequest(str(toys.save_toy("llama", tmp_path / "m")), tmp_path / "out"), cancel)
    next(events)
    cancel.set()
    with pytest.raises(LowMemError, match="Stopped"):
        list(events)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_graph_with_another_tokenizers_prompt_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="tokenizer"):
        next(
            decode(
                OnnxModel(folders["llama"]), [[100_000]], GenerateOptions(), eos_ids=frozenset(), cancel=CancelToken()
            )
        )  # type: ignore[arg-type]


def test_long_prompts_are_read_in_pieces_and_stop_is_heard(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem.runtime.onnx import model as onnx_session

    monkeypatch.setattr(onnx_session, "LARGEST_PIECE", 32)
    graph, ids = OnnxModel(folders["llama"]), torch.tensor([toys.prompt(100)])
    wanted = toys.toy("llama")(input_ids=ids).logits[:, -1:]
    assert torch.allclose(graph(ids, logits_to_keep=1).logits, wanted, atol=1e-4)
    cancel = CancelToken()
    handle = graph.register_forward_pre_hook(lambda *_: cancel.set() or cancel.check())
    with pytest.raises(LowMemError, match="Stopped"):
        graph(ids, logits_to_keep=1)
    handle.remove()


def test_the_manifest_survives(folders: dict[str, Path]) -> None:
    manifest = read_manifest(folders["int8"])
    assert set(manifest.files) == {GRAPH, DATA, PREFILL}
    assert manifest.kind == "fused"
    assert manifest.int8_range in (63, 127)
    assert dataclasses.asdict(manifest)["parity"]["passed"]
