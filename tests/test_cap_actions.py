"""Actions in a budget just above their own estimate: the cap refuses none of them, and none passes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toys

from lowmem.events import Receipt
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_isolated
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.run import quantize_isolated
from lowmem.runtime.remote import WorkerSession

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a cap")

ROOM = 1.03
INT4 = ExportOptions(precision="int4")
GREEDY = GenerateOptions(greedy=True, max_new_tokens=16)
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module", params=["toy", pytest.param("demo", marks=pytest.mark.real)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "toy":
        return str(toys.save_toy("llama", tmp_path_factory.mktemp("model")))
    return request.param


def last(events: Iterator[Any]) -> Receipt:
    *_, receipt = events
    assert isinstance(receipt, Receipt)
    return receipt


def loaded(model: str) -> WorkerSession:
    session = WorkerSession()
    last(session.load(session.plan_for(model, Goal(context=512, precision="int8"))))
    return session


def generate(session: WorkerSession, _: Path) -> Iterator[Any]:
    return session.generate(TEXT * 8, GREEDY, raw=True)


def batch(session: WorkerSession, _: Path) -> Iterator[Any]:
    return session.batch([TEXT * 4] * 8, GREEDY, raw=True, batch_size=8)


def hidden(session: WorkerSession, folder: Path) -> Iterator[Any]:
    return session.run(actions.hidden_states, TEXT * 60, 128, 64, folder / "hidden.npy")


def quantize(model: str, folder: Path, budget: MemoryBudget) -> Iterator[Any]:
    return quantize_isolated(
        QuantizeRequest.validated(model, "rtn", {"group_size": 32}, out=folder / "quantized", budget=budget)
    )


def export(model: str, folder: Path, budget: MemoryBudget) -> Iterator[Any]:
    return export_isolated(ExportRequest(model, folder / "graph", INT4, budget))


def check(receipt: Receipt, budget: int) -> None:
    assert receipt.measured["ram"] <= 1.02 * budget
    assert not [note for note in receipt.notes if "Memory ran out" in note]


def test_a_model_loads(model):
    session = WorkerSession()
    plan = session.plan_for(model, Goal(context=512, precision="int8"))
    budget = int(ROOM * plan.main.peak)
    try:
        receipt = last(session.load(replace(plan, budget=MemoryBudget(budget))))
        check(receipt, budget)
        assert receipt.precision == "int8"
    finally:
        session.unload()


@pytest.mark.parametrize("action", [generate, batch, hidden])
def test_it_answers(model, action: Callable[..., Iterator[Any]], tmp_path):
    session = loaded(model)
    try:
        budget = int(ROOM * last(action(session, tmp_path)).predicted["ram"])
    finally:
        session.unload()
    session = loaded(model)
    try:
        session.set_budget(MemoryBudget(budget))
        check(last(action(session, tmp_path)), budget)
    finally:
        session.unload()


@pytest.mark.parametrize("job", [quantize, export])
def test_a_job_ends(model, job: Callable[..., Iterator[Any]], tmp_path):
    (tmp_path / "free").mkdir()
    (tmp_path / "tight").mkdir()
    budget = int(ROOM * last(job(model, tmp_path / "free", UNLIMITED)).predicted["ram"])
    check(last(job(model, tmp_path / "tight", MemoryBudget(budget))), budget)
