"""What bad input to an export, or to an exported graph, gets: a kind of failure, one sentence, a next step."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import tokenizers
import torch
import toys
import transformers
from onnx import TensorProto, helper

from lowmem.__main__ import main
from lowmem.errors import BadInput, CorruptModel, DiskFull, LowMemError, OutOfMemory, Unsupported
from lowmem.events import Receipt
from lowmem.export import generic, run
from lowmem.export.graph import WeightFile
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_isolated
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.fallback import WHILE_LOADING, next_fallback
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.planner import plan
from lowmem.runtime.onnx.manifest import DATA, GRAPH, MANIFEST, PREFILL, read_manifest
from lowmem.runtime.onnx.model import OnnxModel, open_session
from lowmem.runtime.session import Session

Act = Callable[[], object]


def said(kind: type[LowMemError], words: str, act: Act) -> str:
    """`act` fails with one sentence of this kind that matches `words`, and a hint; the sentence is returned."""
    with pytest.raises(LowMemError, match=words) as caught:
        act()
    error = caught.value
    assert type(error) is kind
    assert "\n" not in error.message
    assert "\x1b" not in error.message
    assert "[ONNXRuntimeError]" not in error.message
    assert len(error.message) < 400
    assert error.hint
    return error.message


def export(source: Path, out: Path, **options: object) -> Receipt:
    *_, receipt = run.export_model(ExportRequest(str(source), out, ExportOptions(**options)))  # type: ignore[arg-type]
    assert isinstance(receipt, Receipt)
    return receipt


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("source") / "m")


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """An int8 export: two graphs that share one file of weights."""
    export(source, source.with_name("int8"), precision="int8")
    return source.with_name("int8")


@pytest.fixture
def made(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "made")


def loading(folder: Path, damage: Act, *, planned_before: bool = True) -> Act:
    """Load a folder that is damaged after it was planned, or before."""
    if not planned_before:
        damage()
    session = Session()
    hardware = session.hardware()
    best = plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    if planned_before:
        damage()
    return lambda: list(session.load(best))


# --- operators and versions


def save_graph(path: Path, node: onnx.NodeProto, *, opset: int = 21, ir_version: int = 10, location: str = "") -> Path:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.raw_data = np.ones(4, np.float32).tobytes()
    if location:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            weight.external_data.add(key=key, value=value)
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [weight])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString())
    return path


def test_an_operator_that_the_runtime_lacks_is_named(tmp_path: Path) -> None:
    unknown = save_graph(tmp_path / "g.onnx", helper.make_node("Nonsense", ["x"], ["y"]))
    assert "g.onnx" in said(Unsupported, "has no .*Nonsense", lambda: open_session(unknown))
    for_gpus = helper.make_node("BiasAdd", ["x", "w", "x"], ["y"], domain="com.microsoft")
    no_kernel = save_graph(tmp_path / "k.onnx", for_gpus)
    said(Unsupported, "has no .*BiasAdd", lambda: open_session(no_kernel))


def test_a_later_opset_and_a_later_format_are_named_with_what_is_read_here(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    for change, words in (
        ({"opset": 99}, r"opset 99, .* at most \d\d\."),
        ({"ir_version": 99}, r"IR version 99, .*\d\."),
    ):
        path = save_graph(tmp_path / "g.onnx", relu, **change)
        said(Unsupported, words, lambda path=path: open_session(path))


class Odd(torch.nn.Module):
    """Computes with an operator that ONNX has not."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        logits = self.inner(*args, **kwargs)
        return logits + torch.linalg.eigvalsh(logits[..., :4, None] * logits[..., None, :4]).sum()


def test_an_operator_that_onnx_lacks_is_named_when_a_model_is_traced(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "models"
    source, make = toys.save_toy("gpt2", folder / "m"), generic.LazyModel

    def odd(*arguments: object) -> object:
        lazy = make(*arguments)  # type: ignore[arg-type]
        lazy.model.lm_head = Odd(lazy.model.lm_head)
        return lazy

    monkeypatch.setattr(generic, "LazyModel", odd)
    said(Unsupported, r"eigh|eigvalsh", lambda: export(source, folder / "out", precision="fp32"))
    assert [path.name for path in folder.iterdir()] == ["m"]


def test_memory_that_runs_out_while_tracing_is_not_the_models_fault(tmp_path: Path, monkeypatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(OutOfMemory):
        export(toys.save_toy("gpt2", tmp_path / "m"), tmp_path / "out", precision="fp32")


# --- files of a graph


def test_weights_that_are_missing_or_cut_short_are_named_on_loading(made: Path) -> None:
    size = (made / DATA).stat().st_size
    short = said(CorruptModel, DATA, loading(made, lambda: os.truncate(made / DATA, size - 1)))
    assert f"{size - 1:,} bytes" in short
    assert f"{size:,}" in short
    said(CorruptModel, f"lacks {DATA}", loading(made, (made / DATA).unlink))


def test_weights_that_a_graph_itself_lacks_are_one_sentence(made: Path, tmp_path: Path) -> None:
    """What a manifest cannot know: another program's graph, or one whose description fits its damage."""
    add = helper.make_node("Add", ["x", "w"], ["y"])
    missing = save_graph(tmp_path / "g.onnx", add, location="lost.data")
    said(CorruptModel, "weights of g.onnx are missing", lambda: open_session(missing))
    (tmp_path / "lost.data").write_bytes(b"short")
    said(CorruptModel, "weights of g.onnx are missing, truncated", lambda: open_session(missing))
    (made / PREFILL).write_bytes(b"\0" * (made / PREFILL).stat().st_size)
    said(CorruptModel, f"{PREFILL} cannot be loaded", lambda: OnnxModel(made))


def test_a_manifest_that_is_damaged_or_later_is_one_sentence(made: Path) -> None:
    text = (made / MANIFEST).read_text()
    for damaged, kind, words in (
        ("{", CorruptModel, "cannot be read"),
        ("[]", CorruptModel, "cannot be read"),
        (text.replace('"files": {', '"files": 3, "other": {'), CorruptModel, "cannot be read"),
        (text.replace('"version": 2', '"version": 3'), Unsupported, "format 3"),
    ):
        (made / MANIFEST).write_text(damaged)
        said(kind, words, lambda: OnnxModel(made))


def test_a_manifest_of_the_first_version_is_read(made: Path) -> None:
    text = (made / MANIFEST).read_text()
    (made / MANIFEST).write_text(text.replace('"parity"', '"proof"').replace('"version": 2', '"version": 1'))
    assert read_manifest(made).parity["passed"]


def test_files_beyond_limits_of_2_gb_are_read(tmp_path: Path) -> None:
    """Weights behind a hole of 5 GB, which takes no disk."""
    path = tmp_path / "g.onnx"
    with WeightFile(tmp_path / DATA) as weights:
        weights._file.seek(5_000_000_000)
        entry = weights.add("w", np.arange(1000, dtype=np.float32))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [entry])
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    found = open_session(path).run(None, {"x": np.zeros(1000, np.float32)})[0]
    assert np.array_equal(found, np.arange(1000))


# --- a graph that does not go with the rest


def test_a_graph_without_a_cache_is_refused_by_name_and_by_its_inputs(made: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    export(tmp_path / "bert", tmp_path / "encoder", precision="fp32")
    said(Unsupported, "encoder.*does not generate", lambda: read_spec(str(tmp_path / "encoder")))
    save_graph(made / GRAPH, helper.make_node("Add", ["x", "w"], ["y"]))
    values = json.loads((made / MANIFEST).read_text())
    values["files"][GRAPH] = (made / GRAPH).stat().st_size
    (made / MANIFEST).write_text(json.dumps(values))
    said(Unsupported, "has no KV cache", loading(made, lambda: None))


def test_tokens_that_the_graph_does_not_know_are_refused_in_a_prompt(made: Path) -> None:
    other = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    other.add_tokens([f"<word {number}>" for number in range(100)])
    other.save(str(made / "tokenizer.json"))
    session = Session()
    hardware = session.hardware()
    list(session.load(plan(read_spec(str(made)), hardware, MemoryBudget.detect(hardware), Goal(context=256))))
    short = GenerateOptions(max_new_tokens=2, greedy=True)
    assert list(session.generate("Hello", short, raw=True))
    said(BadInput, r"token 265, .* only 260", lambda: list(session.generate("<word 5>", short, raw=True)))


def test_a_tokenizer_that_cannot_be_read_is_said(made: Path) -> None:
    damage = lambda: (made / "tokenizer.json").write_text("{")  # noqa: E731
    said(CorruptModel, "tokenizer .* cannot be read", loading(made, damage, planned_before=False))


def test_what_only_torch_can_do_is_refused_for_an_exported_folder(made: Path) -> None:
    """It holds nothing that torch could load instead."""
    from lowmem.generate.options import GenerateOptions

    session = Session()
    hardware = session.hardware()
    best = plan(read_spec(str(made)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    assert (best.precision, best.or_torch) == ("int8", False)
    list(session.load(best))
    options = GenerateOptions(max_new_tokens=4, window=32)
    said(Unsupported, "has no window", lambda: list(session.generate("Hello", options, raw=True)))
    assert session.plan is not None
    lower = next_fallback(best, WHILE_LOADING)
    assert lower is None or not lower.spec.exported


# --- the disk, and places that are not one's own


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while a graph is written, whoever writes it."""
    import onnx_ir

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightFile, "_write", fails)
    monkeypatch.setattr(onnx_ir, "save", fails)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("full")
def test_a_disk_that_fills_up_ends_an_export_and_leaves_nothing(source: Path, tmp_path: Path, fused: bool) -> None:
    said(DiskFull, "full: out was not finished", lambda: export(source, tmp_path / "out", fused=fused))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_how_far_the_weights_came_is_said() -> None:
    def write() -> None:
        with WeightFile(Path("/dev/full")) as weights:
            weights.add("large", np.zeros(1_000_000, np.float32))

    said(DiskFull, "full after", write)


def test_what_the_disk_cannot_hold_is_known_before(source: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lowmem.export.request.disk_free_bytes", lambda folder: 1000)
    said(DiskFull, r"1\.00 KB is free", lambda: export(source, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "a/b", ".hidden"])
def test_a_manifest_that_names_files_elsewhere_is_refused(made: Path, name: str) -> None:
    values = json.loads((made / MANIFEST).read_text())
    values["files"][name] = 1
    (made / MANIFEST).write_text(json.dumps(values))
    assert name in said(CorruptModel, "not in the folder", lambda: read_manifest(made))


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_a_graph_whose_weights_lie_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    (tmp_path / "g").mkdir()
    path = save_graph(tmp_path / "g" / "g.onnx", helper.make_node("Add", ["x", "w"], ["y"]), location=location)
    said(CorruptModel, "outside its folder", lambda: open_session(path))


def test_folders_that_cannot_be_written_are_refused(source: Path, whole: Path, tmp_path: Path) -> None:
    said(BadInput, "already", lambda: export(source, whole))
    (tmp_path / "file").write_text("")
    said(BadInput, "cannot be written to", lambda: export(source, tmp_path / "file" / "out"))


def test_an_export_of_an_export_is_refused(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(BadInput, "already an exported graph", lambda: export(whole, tmp_path / "out"))
    assert main(["export", str(whole), str(tmp_path / "out")]) == 3
    assert "already an exported graph" in capsys.readouterr().err


def test_a_stranger_exports_no_path(source: Path, tmp_path: Path) -> None:
    events = export_isolated(ExportRequest(str(source), tmp_path / "out", allow_paths=False))
    said(BadInput, "outside the folders", lambda: list(events))
    assert list(tmp_path.iterdir()) == []


def test_groups_that_do_not_divide_a_layer_are_filled_up(source: Path, tmp_path: Path) -> None:
    receipt = export(source, tmp_path / "out", precision="int4", group_size=128)  # of 64 and 96 inputs
    assert receipt.details["parity"]["passed"]


def test_a_process_that_dies_while_it_writes_leaves_nothing(source: Path, tmp_path: Path, monkeypatch) -> None:
    from lowmem.export import run

    def dies(function: str, arguments: dict[str, str], *_: object) -> Iterator[object]:
        part = Path(arguments["out"] + ".part")
        part.mkdir()
        (part / DATA).write_bytes(b"half")
        yield from ()
        raise OutOfMemory("The system killed the job.", "Choose a smaller model.")

    monkeypatch.setattr(run, "run_isolated", dies)
    said(OutOfMemory, "killed", lambda: list(export_isolated(ExportRequest(str(source), tmp_path / "out"))))
    assert list(tmp_path.iterdir()) == []
