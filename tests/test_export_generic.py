"""Graphs by PyTorch's exporter, encoders, the optimiser; and TensorRT as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
import toys
import transformers

from lowmem.errors import MissingDependency, OutOfMemory, Unsupported
from lowmem.events import CancelToken, Receipt
from lowmem.export import tensorrt
from lowmem.export.manifest import GRAPH, read_manifest
from lowmem.export.onnx_session import OnnxModel
from lowmem.export.options import ExportOptions
from lowmem.export.pipeline import export_model
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.units import GB, MB


def export(source: Path, out: Path, **options: object) -> Receipt:
    *_, receipt = export_model(source, out, ExportOptions(**options))  # type: ignore[arg-type]
    assert isinstance(receipt, Receipt)
    return receipt


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_any_decoder_becomes_a_graph_with_a_cache(tmp_path: Path, family: str) -> None:
    receipt = export(toys.save_toy(family, tmp_path / "m"), tmp_path / "out", precision="fp32")
    assert receipt.details["kind"] == "decoder"
    prompts = [toys.prompt(length, seed=length) for length in (4, 19)]
    options = GenerateOptions(greedy=True, max_new_tokens=8, num_sequences=2, prefill_chunk=16)

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


@pytest.mark.parametrize(("precision", "operator"), [("int8", "MatMulInteger"), ("int4", "MatMulNBits")])
def test_generic_graphs_are_quantized_by_onnxruntime(tmp_path: Path, precision: str, operator: str) -> None:
    import onnx

    receipt = export(toys.save_toy("gpt2", tmp_path / "m"), tmp_path / "out", precision=precision)
    assert receipt.details["proof"]["passed"]
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph.node]
    assert operators.count(operator) == 8  # four layers in each of two blocks


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
def test_an_encoder_is_exported_and_proven(bert: Path, tmp_path: Path, precision: str) -> None:
    receipt = export(bert, tmp_path / "out", precision=precision)
    assert receipt.details["kind"] == "encoder"
    assert receipt.details["proof"]["passed"]
    with pytest.raises(Unsupported, match="no KV cache"):
        OnnxModel(tmp_path / "out")


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
        next(tensorrt.export_engine(tmp_path, tmp_path / "out", ExportOptions(format="tensorrt")))


def test_the_workspace_leaves_room(made_up) -> None:
    gpu = made_up(vram_gb=16).gpus[0]
    assert gpu.free_bytes / 4 < tensorrt.workspace_bytes(gpu) <= gpu.free_bytes / 2
    assert tensorrt.workspace_bytes(made_up(vram_gb=0.3).gpus[0]) >= 256 * MB


def test_a_model_is_cut_into_runs_of_blocks_that_fit() -> None:
    runs = tensorrt.segments([100] * 10, ends_bytes=50, limit=330)
    assert [(run.first, run.last) for run in runs] == [(0, 2), (2, 5), (5, 8), (8, 10)]
    assert all(run.weight_bytes <= 330 for run in runs)
    assert tensorrt.segments([100] * 3, 10, GB) == [tensorrt.Segment(0, 3, 310)]
    with pytest.raises(OutOfMemory, match="One block"):
        tensorrt.segments([500 * MB], 0, 300 * MB)


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
