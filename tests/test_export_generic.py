"""Graphs by PyTorch's exporter, encoders, the optimiser; and TensorRT as far as it goes without a GPU."""

from __future__ import annotations

import errno
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
import transformers

from lowmem.errors import DiskFull, MissingDependency, OutOfMemory, Unsupported
from lowmem.events import CancelToken, Receipt
from lowmem.export import lazy, run, segments, tensorrt
from lowmem.export.request import ExportRequest, estimate
from lowmem.export.run import benchmark, export_isolated
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.models.catalog import find
from lowmem.models.source import read_spec
from lowmem.planning.graph_options import ExportOptions
from lowmem.plots.engines import graph_benchmark
from lowmem.runtime.onnx.manifest import GRAPH, read_manifest
from lowmem.runtime.onnx.model import OnnxModel, open_session
from lowmem.ui.html import export as export_render
from lowmem.units import GB, MB


def export(source: Path, out: Path, **options: object) -> Receipt:
    *_, receipt = run.export_model(ExportRequest(str(source), out, ExportOptions(**options)))  # type: ignore[arg-type]
    assert isinstance(receipt, Receipt)
    return receipt


@pytest.fixture(autouse=True)
def _toys_have_large_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "LARGE", 1025)


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama", "qwen2", "qwen3", "gemma", "gemma3"])
def test_any_decoder_becomes_a_graph_with_a_cache(tmp_path: Path, family: str) -> None:
    receipt = export(toys.save_toy(family, tmp_path / "m"), tmp_path / "out", precision="fp32", fused=False)
    assert receipt.details["kind"] == "decoder"
    prompts = [toys.prompt(length, seed=length) for length in (4, 19)]
    options = GenerateOptions(greedy=True, max_new_tokens=8, num_return_sequences=2, prefill_chunk=16)

    def answers(model: object) -> list[Tokens]:
        events = decode(model, prompts, options, eos_ids=frozenset({9}), cancel=CancelToken())  # type: ignore[arg-type]
        return [event for event in events if isinstance(event, Tokens)]

    assert answers(OnnxModel(tmp_path / "out")) == answers(toys.toy(family))


def test_a_fused_family_can_be_written_in_standard_operators(tmp_path: Path) -> None:
    import onnx

    receipt = export(toys.save_toy("llama", tmp_path / "m"), tmp_path / "out", precision="fp32", fused=False)
    assert receipt.details["kind"] == "decoder"
    domains = {node.domain for node in onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph.node}
    assert domains == {""}


@pytest.mark.parametrize(("precision", "operator"), [("int8", "MatMulIntegerToFloat"), ("int4", "MatMulNBits")])
def test_generic_graphs_are_quantized_weight_by_weight(tmp_path: Path, precision: str, operator: str) -> None:
    import onnx

    receipt = export(toys.save_toy("gpt2", tmp_path / "m"), tmp_path / "out", precision=precision)
    assert receipt.details["parity"]["passed"]
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph.node]
    assert operators.count(operator) == 9  # four layers in each of two blocks, and the head


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, intermediate_size=64
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_encoder_is_exported_and_verified(bert: Path, tmp_path: Path, precision: str) -> None:
    receipt = export(bert, tmp_path / "out", precision=precision)
    assert receipt.details["kind"] == "encoder"
    assert receipt.details["parity"]["passed"]
    with pytest.raises(Unsupported, match="no KV cache"):
        OnnxModel(tmp_path / "out")


def test_an_encoder_is_exported_by_name_though_nothing_else_takes_it(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is an encoder"):
        read_spec(str(bert))
    spec = read_spec(str(bert), encoders=True)
    expected = estimate(spec, ExportOptions(precision="int8"), 400 * MB, 9 * GB)
    assert "encoder" in expected.sentence()
    *_, receipt = export_isolated(ExportRequest(str(bert), tmp_path / "out", ExportOptions(precision="int8")))
    assert isinstance(receipt, Receipt)
    assert receipt.details["kind"] == "encoder"
    assert receipt.measured["ram"] <= receipt.predicted["ram"]
    *_, result = benchmark(str(bert), tmp_path / "out")
    assert isinstance(result, dict)
    assert len(result["torch"]["prefill_tps"]) == len(result["onnx"]["prefill_tps"]) == len(result["prompts"])
    assert result["onnx"]["token_ms"] == [None] * len(result["prompts"])
    assert len(graph_benchmark(result)) == 1
    assert "Relative error" in export_render.receipt(receipt)


def test_the_optimiser_reads_heads_and_shows_what_it_did(bert: Path, tmp_path: Path) -> None:
    receipt = export(bert, tmp_path / "out", precision="fp32", optimise=True)
    report = receipt.details["optimised"]
    assert report["after"]["nodes"] < report["before"]["nodes"]
    assert report["fusions"]
    assert {"nodes", "bytes", "seconds", "operators"} <= set(report["after"])
    assert read_manifest(tmp_path / "out").optimised == report


# --- TensorRT ------------------------------------------------------------------------------------


def test_the_missing_piece_is_named(made_up, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "NVIDIA GPU" in str(tensorrt.available(made_up()))
    assert "not installed" in str(tensorrt.available(made_up(vram_gb=16)))
    assert "fp16" in str(tensorrt.available(made_up(vram_gb=4, dtypes=("fp32",))))
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    assert tensorrt.available(made_up(vram_gb=16)) is None


def test_without_a_gpu_an_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="NVIDIA GPU"):
        next(tensorrt.export_engine(tmp_path, ExportRequest("x", tmp_path / "out", ExportOptions(format="tensorrt"))))


def test_the_workspace_leaves_room(made_up) -> None:
    gpu = made_up(vram_gb=16).gpus[0]
    assert gpu.free_bytes / 4 < tensorrt.workspace_bytes(gpu) <= gpu.free_bytes / 2
    assert tensorrt.workspace_bytes(made_up(vram_gb=0.3).gpus[0]) >= 256 * MB


def test_a_model_is_cut_into_runs_of_blocks_that_fit(made_up) -> None:
    runs = segments.segments([100] * 10, ends_bytes=50, limit=330)
    assert [(run.first, run.last) for run in runs] == [(0, 2), (2, 5), (5, 8), (8, 10)]
    assert all(run.weight_bytes <= 330 for run in runs)
    assert segments.segments([100] * 3, 10, GB) == [segments.Segment(0, 3, 310)]
    with pytest.raises(OutOfMemory, match="One block"):
        segments.segments([500 * MB], 0, 300 * MB)
    spec = find("Qwen/Qwen2.5-7B-Instruct").spec()
    small, large = (tensorrt.model_segments(spec, made_up(vram_gb=size).gpus[0]) for size in (6, 80))
    assert len(large) == 1
    assert len(small) > 4
    assert sum(run.weight_bytes for run in small) == large[0].weight_bytes == 2 * sum(t.elements for t in spec.tensors)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pieces_of_a_graph_compute_what_it_computes(tmp_path: Path, family: str, precision: str) -> None:
    export(toys.save_toy(family, tmp_path / "m"), tmp_path / "out", precision=precision, fused=False)
    graph = tmp_path / "out" / GRAPH
    runs = [segments.Segment(0, 1, 0), segments.Segment(1, 2, 0)]
    pieces = [open_session(path) for path in segments.cut(graph, runs)]
    whole = open_session(graph)
    shapes = {value.name: value.shape for value in whole.get_inputs()}
    random, dtype = np.random.default_rng(0), np.float16 if precision == "fp16" else np.float32
    feeds = {
        name: random.standard_normal((1, shape[1], 4, shape[3]), np.float32).astype(dtype)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    feeds |= {
        "input_ids": np.array([[5, 6, 7]]),
        "attention_mask": np.ones((1, 7), np.int64),
        "position_ids": np.array([[4, 5, 6]]),
    }
    names = [value.name for value in whole.get_outputs()]
    found = segments.chained(pieces, feeds)
    for name, wanted in zip(names, whole.run(names, feeds), strict=True):
        np.testing.assert_allclose(found[name], wanted, atol=1e-5 if precision == "fp32" else 0.02)
    ranges = [
        tensorrt.shape_ranges(tensorrt.graph_inputs(path), tensorrt.Profile())
        for path in graph.parent.glob("model-*.onnx")
    ]
    assert all(
        all(size > 0 or name.startswith("past") for size in shape)
        for part in ranges
        for name, three in part.items()
        for shape in three
    )


def test_a_graph_without_names_of_blocks_cannot_be_split(small_graph: Path) -> None:
    with pytest.raises(Unsupported, match="cannot be split"):
        segments.cut(small_graph, [segments.Segment(0, 1, 0), segments.Segment(1, 2, 0)])


def test_engines_are_kept_by_gpu_version_shapes_and_content(made_up, tmp_path: Path) -> None:
    graph = tmp_path / GRAPH
    graph.write_bytes(b"one")
    t4, other = made_up(vram_gb=16).gpus[0], made_up(vram_gb=16, name="NVIDIA L4").gpus[0]
    profile = tensorrt.Profile()
    paths = {
        tensorrt.engine_path(graph, t4, profile, "11.1"),
        tensorrt.engine_path(graph, other, profile, "11.1"),
        tensorrt.engine_path(graph, t4, profile, "11.2"),
        tensorrt.engine_path(graph, t4, tensorrt.Profile(batch=(1, 2, 8)), "11.1"),
    }
    assert len(paths) == 4
    graph.write_bytes(b"other")
    assert tensorrt.engine_path(graph, t4, profile, "11.1") not in paths


def test_provider_options_and_profiles_come_from_the_graph(made_up, tmp_path: Path) -> None:
    export(toys.save_toy("llama", tmp_path / "m"), tmp_path / "out", precision="fp16", fused=False)
    inputs = tensorrt.graph_inputs(tmp_path / "out" / GRAPH)
    profile = tensorrt.Profile(batch=(1, 1, 2), new=(1, 4, 8), past=(0, 16, 32))
    ranges = tensorrt.shape_ranges(inputs, profile)
    assert ranges["input_ids"] == [(1, 1), (1, 4), (2, 8)]
    assert ranges["attention_mask"] == [(1, 1), (1, 20), (2, 40)]
    assert ranges["past_key_values.1.value"] == [(1, 2, 0, 16), (1, 2, 16, 16), (2, 2, 32, 16)]
    (name, options), cuda, cpu = tensorrt.provider(made_up(vram_gb=16).gpus[0], tmp_path, inputs, profile)
    assert (name, cuda, cpu) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    assert "input_ids:2x8" in options["trt_profile_max_shapes"]
    assert options["trt_engine_cache_enable"] == "1"


class FakeTensorRT(types.ModuleType):
    """As much of TensorRT 11 as a build touches; what is asked of it is noted."""

    def __init__(self, built: bytes | None = b"engine", parses: bool = True) -> None:
        super().__init__("tensorrt")
        self.said: dict[str, object] = {}
        said = self.said

        class Logger:
            WARNING = 2

            def __init__(self, level: int) -> None: ...

        class Builder:
            def __init__(self, logger: object) -> None: ...

            def create_network(self, flags: int) -> str:
                said["flags"] = flags
                return "network"

            def create_builder_config(self) -> object:
                return types.SimpleNamespace(
                    set_memory_pool_limit=lambda pool, size: said.update(pool=pool, size=size),
                    add_optimization_profile=lambda profile: said.update(profile=profile),
                )

            def create_optimization_profile(self) -> object:
                shapes: dict[str, object] = {}
                said["shapes"] = shapes
                return types.SimpleNamespace(set_shape=lambda name, *ranges: shapes.update({name: ranges}))

            def build_serialized_network(self, network: object, config: object) -> bytes | None:
                return built

        class OnnxParser:
            num_errors = 1

            def __init__(self, network: object, logger: object) -> None: ...

            def parse_from_file(self, path: str) -> bool:
                return parses

            def get_error(self, index: int) -> str:
                return "no such operator"

        self.Logger, self.Builder, self.OnnxParser = Logger, Builder, OnnxParser
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
        self.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")


@pytest.fixture
def small_graph(tmp_path: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "new"])
    out = helper.make_tensor_value_info("y", TensorProto.INT64, ["batch", "new"])
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node("Identity", ["input_ids"], ["y"])], "g", [value], [out])),
        tmp_path / GRAPH,
    )
    return tmp_path / GRAPH


def test_the_builder_is_asked_for_a_strongly_typed_network(made_up, small_graph: Path, monkeypatch) -> None:
    fake = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    gpu = made_up(vram_gb=16).gpus[0]
    engine = small_graph.parent / "engines" / "e.plan"
    tensorrt.build_engine(small_graph, engine, gpu, tensorrt.Profile())
    assert engine.read_bytes() == b"engine"
    assert fake.said["flags"] == 2
    assert fake.said["size"] == tensorrt.workspace_bytes(gpu)
    assert fake.said["shapes"] == {"input_ids": ((1, 1), (1, 1), (4, 512))}


def test_an_engine_that_the_disk_does_not_hold_leaves_nothing(made_up, small_graph: Path, monkeypatch) -> None:
    def fails(path: Path, _data: object) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    monkeypatch.setattr(Path, "write_bytes", fails)
    engine = small_graph.parent / "engines" / "e.plan"
    with pytest.raises(DiskFull, match="6 bytes"):
        tensorrt.build_engine(small_graph, engine, made_up(vram_gb=16).gpus[0], tensorrt.Profile())
    assert list(engine.parent.iterdir()) == []


@pytest.mark.parametrize("fake", [FakeTensorRT(parses=False), FakeTensorRT(built=None), None])
def test_what_tensorrt_refuses_is_one_sentence(made_up, small_graph: Path, monkeypatch, fake) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    with pytest.raises((Unsupported, MissingDependency)) as caught:
        tensorrt.build_engine(
            small_graph, small_graph.parent / "e.plan", made_up(vram_gb=16).gpus[0], tensorrt.Profile()
        )
    assert caught.value.hint
    assert not (small_graph.parent / "e.plan").exists()


def test_the_receipt_is_json(tmp_path: Path) -> None:
    receipt = export(toys.save_toy("llama", tmp_path / "m"), tmp_path / "out", precision="int8")
    assert json.loads(json.dumps(receipt.as_dict()))["action"] == "export"


def test_engines_come_from_the_cache_or_from_who_can_build(made_up, small_graph: Path, monkeypatch) -> None:
    asked = []

    def build(graph: Path, engine: Path, *_: object) -> None:
        asked.append(engine)
        engine.parent.mkdir(parents=True, exist_ok=True)
        engine.mkdir() if engine.suffix == "" else engine.write_bytes(b"engine")

    gpu, profile = made_up(vram_gb=16).gpus[0], tensorrt.Profile()
    for who, there, suffix in (("build_engine", types.SimpleNamespace(), ".plan"), ("build_by_provider", None, "")):
        monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name, there=there: there)
        monkeypatch.setattr(tensorrt, who, build)
        assert tensorrt.engine_of(small_graph, gpu, profile).suffix == suffix
        assert tensorrt.engine_of(small_graph, gpu, profile) == asked[-1]
    assert len(asked) == 2


@pytest.mark.parametrize("free_gb", [16, 0.1])
def test_an_engine_export_goes_from_the_verified_graph_to_engines(made_up, tmp_path, monkeypatch, free_gb) -> None:
    source = toys.save_toy("llama", tmp_path / "m")
    monkeypatch.setattr(tensorrt, "probe", lambda: made_up(vram_gb=16))
    monkeypatch.setattr(tensorrt, "available", lambda hardware: None)
    if free_gb < 1:
        whole = tensorrt.model_segments(read_spec(str(source)), made_up(vram_gb=16).gpus[0])[0].weight_bytes
        monkeypatch.setattr(tensorrt, "ENGINE_SHARE", 0.6 * whole / (16 * GB))
    engine = tmp_path / "engine"
    engine.write_bytes(b"12")
    monkeypatch.setattr(tensorrt, "engine_of", lambda graph, gpu, profile: engine)
    *_, receipt = tensorrt.export_engine(
        source, ExportRequest(str(source), tmp_path / "out", ExportOptions(format="tensorrt"))
    )
    assert isinstance(receipt, Receipt)
    pieces = len(list((tmp_path / "out").glob("model-*.onnx")))
    assert (len(receipt.details["engines"]), pieces) == ((1, 0) if free_gb > 1 else (2, 2))
    assert receipt.details["parity"]["passed"]
