"""What the package grows by is one file and one line: a toy of each kind registers, and everything else knows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
import pytest
import torch
import toys
from conftest import machine
from torch import Tensor, nn
from ui_stub import StubEngine

from lowmem import quant
from lowmem.__main__ import main
from lowmem.events import CancelToken, Chunk, Receipt
from lowmem.generate.options import GenerateOptions
from lowmem.kernels.quantized import Quantized
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.device import Device
from lowmem.measure.estimate import peaks, quantized
from lowmem.measure.options import MeasureOptions
from lowmem.measure.variants import parse_variant
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.precisions import PRECISIONS, Precision
from lowmem.quant import base, get
from lowmem.quant.estimate import estimate_quantization
from lowmem.quant.gptq_format import GptqFormat
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.run import quantize
from lowmem.quant.seconds import quantize_seconds
from lowmem.runtime.session import Session
from lowmem.sweep.grid import make_grid
from lowmem.ui import tabs
from lowmem.ui.page import build_ui
from lowmem.ui.parts.context import Context, Tab
from lowmem.ui.service.compare import CompareService
from lowmem.ui.service.engine import Engine, precision_label
from lowmem.ui.tabs.quantize_form import _bits
from lowmem.units import GB


class HalfLinear(nn.Module):
    """`y = x W^T + b` from weights in bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.bfloat16(), requires_grad=False), bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Toy(Precision):
    """Two bytes a weight, on CPUs, where it is the first choice."""

    def refusal(self, device: Device) -> str | None:
        return None if device.kind == "cpu" else "The toy runs on CPUs."

    def rank(self, device: Device) -> int | None:
        return -1 if device.kind == "cpu" else None

    def quantizes(self, inputs: int) -> bool:
        return inputs % 32 == 0

    def linear_bytes(self, outputs: int, inputs: int) -> int:
        return 2 * outputs * inputs

    def linear(self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        return HalfLinear(weight, bias)


@pytest.fixture
def toy_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRECISIONS, "toy", Toy("toy", "toy (two bytes a weight)"))


@pytest.mark.usefixtures("toy_precision")
def test_a_precision_is_planned_loaded_and_offered(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path)
    spec, session = read_spec(str(folder)), Session()
    hardware = session.hardware()
    assert plan(spec, machine(), MemoryBudget.detect(machine()), Goal(context=64)).precision == "toy"

    chosen, full = (
        plan(
            spec,
            hardware,
            MemoryBudget.detect(hardware),
            Goal(context=64, precision=key, device="cpu", backend="torch"),
        )
        for key in ("toy", "fp32")
    )
    list(session.load(chosen))
    assert session._loaded is not None
    layers = [module for module in session._loaded.model.modules() if isinstance(module, HalfLinear)]
    saved = sum(layer.weight.nbytes for layer in layers)
    assert len(layers) == 2 * 7
    assert full.main.share("weights") - chosen.main.share("weights") == saved
    assert chosen.main.share("weights") == sum(p.nbytes for p in session._loaded.model.parameters())
    assert any(isinstance(event, Chunk) for event in session.generate("Hello", GenerateOptions(max_new_tokens=2)))

    engine = Engine(lambda: session)
    assert engine.precisions("cpu")["toy"] is None
    assert precision_label("toy") == "toy (two bytes a weight)"


class ToyMethod(GptqFormat):
    """Round to nearest under another name: the least that a method has to define."""

    name = "toy"
    label = "Toy rounding"
    description = "A toy; takes no time."
    Options = base.Options

    def quantize(self, weights: Sequence[Tensor], hessian: Any, options: Any, cancel: CancelToken) -> list[Quantized]:
        return get("rtn").quantize(weights, hessian, get("rtn").Options(options.bits, options.group_size), cancel)


@pytest.fixture
def toy_method(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("lowmem.quant.methods.toy")
    vars(module)["METHOD"] = ToyMethod()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(quant, "METHODS", (*quant.METHODS, "toy"))


@pytest.mark.usefixtures("toy_method")
def test_a_quantization_method_is_estimated_run_saved_loaded_and_measured(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path / "toy")
    request = QuantizeRequest.validated(str(folder), "toy", {"group_size": 32}, out=tmp_path / "out")
    expected = estimate_quantization(read_spec(str(folder)), request)
    *_, receipt = quantize(request)
    assert isinstance(receipt, Receipt)
    assert receipt.precision.startswith("Toy rounding")
    assert receipt.disk_bytes == expected.output_bytes
    assert 0 < quantize_seconds(read_spec(str(folder)), request, again=False) < 60
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["meta"]["method"] == "toy"
    assert "Toy rounding" in (tmp_path / "out" / "README.md").read_text()

    session = Session()
    hardware = session.hardware()
    spec = read_spec(str(tmp_path / "out"))
    list(session.load(plan(spec, hardware, MemoryBudget.detect(hardware), Goal(context=64))))
    assert any(isinstance(event, Chunk) for event in session.generate("Hello", GenerateOptions(max_new_tokens=2)))
    variant = parse_variant("toy:4:32")
    assert quantized(read_spec(str(folder)), variant.request(str(folder))).stored == spec.stored
    assert peaks(read_spec(str(folder)), variant, MeasureOptions(), hardware, MemoryBudget(4 * GB))


@pytest.mark.usefixtures("toy_method")
def test_a_quantization_method_is_offered_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    page = str(build_ui(StubEngine()).config)
    assert "('Toy rounding', 'toy')" in page
    assert "toy:4:64" in CompareService(StubEngine()).variants()
    assert _bits("toy") == _bits("rtn")
    grid = make_grid({"models": ["demo"], "methods": {"toy": {"bits": [3, 4]}}})
    assert [cell.variant.name for cell in grid.cells()] == ["fp32", "toy:3:64", "toy:4:64"]
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert "toy" in capsys.readouterr().out


def test_a_tab_is_a_key_a_title_and_what_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(context: Context) -> None:
        gr.HTML(context.engine.hardware().line(), elem_id="toy")

    monkeypatch.setattr(tabs, "TABS", (*tabs.TABS, Tab("toys", "Toys", build)))
    components = build_ui(StubEngine()).config["components"]
    titles = {one["props"]["id"]: one["props"]["label"] for one in components if one["type"] == "tabitem"}
    assert titles["toys"] == "Toys"
    assert any(one["props"].get("elem_id") == "toy" for one in components)
