"""What the package grows by is one file and one line: a toy of each kind registers, and everything else knows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from conftest import machine
from torch import Tensor, nn

from lowmem.events import Chunk
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.device import Device
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.precisions import PRECISIONS, Precision
from lowmem.runtime.session import Session
from lowmem.ui.service.engine import Engine, precision_label


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
