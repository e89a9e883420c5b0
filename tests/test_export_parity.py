"""The parity check refuses graphs with numbers that are not finite, and with one damaged weight."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import toys
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from lowmem.errors import Unsupported
from lowmem.events import CancelToken, WithResult
from lowmem.export import parity, run
from lowmem.export.request import ExportRequest
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import DATA, GRAPH, PREFILL

PRECISIONS = ("fp32", "fp16", "int8", "int4")


def export(source: Path, out: Path, options: ExportOptions) -> Path:
    list(run.export_model(ExportRequest(str(source), out, options)))
    return out


def checked(source: Path, exported: Path, options: ExportOptions) -> parity.ParityCheck:
    running = WithResult(parity.check_decoder(source, exported, None, options, CancelToken()))
    list(running)
    return running.result


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("parity") / "toy")


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exports")
    return {p: export(source, root / p, ExportOptions(precision=p)) for p in PRECISIONS}


# --- one damaged weight


def largest_weights(folder: Path, graph: str) -> list[TensorProto]:
    """The codes or numbers of the matrices of the blocks, as stored outside of the graph."""
    model = onnx.load(folder / graph, load_external_data=False)
    return [
        tensor
        for tensor in model.graph.initializer
        if tensor.external_data and len(tensor.dims) > 1 and ".layers." in tensor.name and "scales" not in tensor.name
    ]


def damage(folder: Path, graph: str, part: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Rewrite the bytes of one matrix in the weight file, by its rows."""
    tensor = next(t for t in largest_weights(folder, graph) if part in t.name and "zeros" not in t.name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, length = int(place["offset"]), int(place["length"])
    rows = np.memmap(folder / DATA, np.uint8, "r+", offset, (tensor.dims[0], length // tensor.dims[0]))
    rows[:] = change(np.array(rows))
    rows.flush()


def zeroed(rows: np.ndarray) -> np.ndarray:
    return np.zeros_like(rows)


def swapped(rows: np.ndarray) -> np.ndarray:
    rows[[0, 1]] = rows[[1, 0]]
    return rows


def permuted(rows: np.ndarray) -> np.ndarray:
    return rows[np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("change", [zeroed, swapped, permuted])
@pytest.mark.parametrize("part", ["o_proj", "down_proj"])
def test_one_damaged_weight_is_refused(
    source: Path, exports: dict[str, Path], tmp_path: Path, precision: str, part: str, change: Callable
) -> None:
    folder = shutil.copytree(exports[precision], tmp_path / "damaged")
    options = ExportOptions(precision=precision)
    damage(folder, GRAPH, part, change)
    assert not checked(source, folder, options).passed


def test_a_damaged_weight_of_the_prefill_graph_is_refused(
    source: Path, exports: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(exports["int8"], tmp_path / "damaged")
    damage(folder, PREFILL, "down_proj", permuted)
    found = checked(source, folder, ExportOptions(precision="int8"))
    assert not found.passed
    assert "rounded weights" in found.gate


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_graphs_differ_by_the_order_of_additions_only(
    source: Path, exports: dict[str, Path], precision: str
) -> None:
    found = checked(source, exports[precision], ExportOptions(precision=precision))
    assert found.passed
    if precision in ("int8", "int4"):
        assert found.weights is not None
        assert found.weights.max_difference < 1e-4


def test_quality_alone_would_not_have_shown_it(source: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    """Two swapped rows cost less than 4 bits do, so that a limit on the loss lets them pass."""
    folder = shutil.copytree(exports["int4"], tmp_path / "damaged")
    damage(folder, GRAPH, "down_proj", swapped)
    found = checked(source, folder, ExportOptions(precision="int4"))
    assert max(found.prefill.kl, found.decode.kl) < parity.GATES["int4"]
    assert not found.passed


# --- numbers that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_agree_with_nothing(bad: float, side: int) -> None:
    pair = [torch.zeros(70, 5), torch.zeros(70, 5)]
    pair[side][66, 2] = bad
    found = parity._agreement([(pair[0], pair[1])])
    assert found.kl == found.max_difference == math.inf
    for precision in PRECISIONS:
        assert not parity._judge(precision, False, found, found)[1]
        assert not parity._judge(precision, False, parity.Agreement(0.0, 0.0, 1.0, 70), found)[1]


def test_a_model_that_overflows_fp16_is_not_published(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path / "loud")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "up_proj" in name or "gate_proj" in name:
            tensors[name] *= 300.0 if "up" in name else 100.0
        elif "down_proj" in name:
            tensors[name] *= 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert list(run.export_model(ExportRequest(str(folder), tmp_path / "fp32", ExportOptions(precision="fp32"))))
    with pytest.raises(Unsupported, match=r"beyond fp16|not finite"):
        list(run.export_model(ExportRequest(str(folder), tmp_path / "fp16", ExportOptions(precision="fp16"))))
    assert not (tmp_path / "fp16").exists()
