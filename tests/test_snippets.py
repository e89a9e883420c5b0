"""The Python that a receipt offers runs as printed, and repeats the action with the same budget and placement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys

from lowmem.datasets.texts import Text
from lowmem.events import Chunk, Completion, Receipt
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.actions import hidden_states, recall, sliding_perplexity, streaming_perplexity
from lowmem.longctx.options import StrategyOptions
from lowmem.longctx.strategies import compare_strategies
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.measure.compare import compare
from lowmem.measure.options import MeasureOptions
from lowmem.measure.variants import parse_variant, parse_variants
from lowmem.offload.run import BlockPlacement, run
from lowmem.offload.run import plan_for as offload_plan
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.placement import Placement
from lowmem.planning.plan import Plan
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.run import quantize
from lowmem.runtime.session import Session
from lowmem.sweep.grid import Grid
from lowmem.sweep.run import sweep

GREEDY = GenerateOptions(greedy=True, max_new_tokens=6)
BUDGET = MemoryBudget.parse("3G")
GOAL = Goal(context=128, precision="fp32", prefill_chunk=64, backend="torch")
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_toy("llama", tmp_path_factory.mktemp("model") / "toy"))


@pytest.fixture
def session(folder: str) -> Iterator[Session]:
    made = Session()
    list(made.load(made.plan_for(folder, GOAL, BUDGET)))
    yield made
    made.unload()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a snippet writes, it writes into the current folder."""
    monkeypatch.chdir(tmp_path)


def receipt_of(events: Any) -> Receipt:
    *_, receipt = events
    assert isinstance(receipt, Receipt)
    return receipt


def repeated(receipt: Receipt, **names: Any) -> dict[str, Any]:
    """What the snippet leaves behind; `event` is its last event."""
    exec(compile(receipt.snippet, "snippet", "exec"), names)
    return names


def last(receipt: Receipt) -> Receipt:
    found = repeated(receipt)["event"]
    assert isinstance(found, Receipt)
    assert found.action == receipt.action
    return found


def same_plan(one: Plan | None, other: Plan | None) -> None:
    assert one is not None
    assert other is not None
    names = ("precision", "device", "context", "batch", "cache_type", "prefill_chunk", "placement", "backend", "budget")
    for name in names:
        assert getattr(one, name) == getattr(other, name), name
    assert one.spec.ref == other.spec.ref


# --- the session


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("places", [None, ("ram", "disk"), ("disk", "disk")])
def test_a_load_is_repeated_with_its_budget_and_placement(
    folder: str, precision: str, places: tuple[str, ...] | None
) -> None:
    session = Session()
    goal = Goal(context=96, precision=precision if places is None else "fp32", cache_type="int8", batch=2)
    plan = session.plan_for(folder, goal, MemoryBudget.parse("2.5G"))
    if places is not None:
        plan = reestimate(plan, placement=Placement(places))
    receipt = receipt_of(session.load(plan))
    made = repeated(receipt)["session"]
    assert made.plan.budget == MemoryBudget.parse("2.5G")
    same_plan(made.plan, session.plan)


def test_a_load_beyond_its_budget_is_repeated_by_force(folder: str) -> None:
    session = Session()
    plan = session.plan_for(folder, GOAL, MemoryBudget(ram=200_000_000))
    assert plan.verdict == "over"
    receipt = receipt_of(session.load(plan, force=True))
    same_plan(repeated(receipt)["session"].plan, session.plan)


def test_a_load_of_a_graph_is_repeated(folder: str, tmp_path: Path) -> None:
    list(export_model(ExportRequest(folder, tmp_path / "graph", ExportOptions(precision="int8"))))
    session = Session()
    receipt = receipt_of(session.load(session.plan_for(str(tmp_path / "graph"), Goal(context=128), BUDGET)))
    assert session.plan is not None
    assert session.plan.backend == "onnx"
    same_plan(repeated(receipt)["session"].plan, session.plan)


def test_an_answer_is_repeated(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 12  # with quotes and newlines
    events = list(session.generate(f"{long}\"\n'", GREEDY, raw=True))
    names = repeated(receipt_of(events))
    assert capsys.readouterr().out == "".join(event.text for event in events if isinstance(event, Chunk))
    same_plan(names["session"].plan, session.plan)


def test_a_conversation_is_repeated(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    events = list(session.generate([{"role": "user", "content": "Hello"}], GREEDY))
    repeated(receipt_of(events))
    assert capsys.readouterr().out == "".join(event.text for event in events if isinstance(event, Chunk))


def test_a_prompt_too_long_for_code_is_read_from_a_file(session: Session) -> None:
    from lowmem.fields import LONGEST_LITERAL, literal

    code = literal("x" * LONGEST_LITERAL, "prompt.json")
    Path("prompt.json").write_text('"the prompt"')
    assert eval(code) == "the prompt"


def test_a_batch_is_repeated(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    events = list(session.batch(["One", "Two and three"], GREEDY, raw=True, batch_size=2))
    names = repeated(receipt_of(events))
    assert [e.text for e in events if isinstance(e, Completion)] == [
        text for text in capsys.readouterr().out.split("\n") if text
    ]
    assert names["event"].details["completions"] == 2
    same_plan(names["session"].plan, session.plan)


# --- long texts


def test_hidden_states_are_repeated(session: Session, tmp_path: Path) -> None:
    receipt = receipt_of(hidden_states(session, TEXT, 32, 16, tmp_path / "own.npy", layers=(0, -1), tokens=80))
    last(receipt)
    assert np.array_equal(np.load("own.npy"), np.load("hidden.npy"))


def test_perplexities_are_repeated(session: Session) -> None:
    sliding = receipt_of(sliding_perplexity(session, TEXT, 32, 16, tokens=90))
    assert last(sliding).details["perplexity"] == sliding.details["perplexity"]
    options = GenerateOptions(window=48, sinks=2)
    streaming = receipt_of(streaming_perplexity(session, TEXT, options, tokens=90))
    assert last(streaming).details["perplexity"] == streaming.details["perplexity"]


def test_recall_is_repeated(session: Session) -> None:
    receipt = receipt_of(recall(session, TEXT, GenerateOptions(window=200, sinks=2), distances=(20, 60)))
    assert last(receipt).details == receipt.details


def test_strategies_are_repeated(folder: str) -> None:
    options = StrategyOptions(tokens=64, window=16, sinks=2, points=1)
    receipt = receipt_of(compare_strategies(folder, Text("mine", TEXT), options, precision="fp32", budget=BUDGET))
    again = last(receipt)
    assert again.precision == receipt.precision == "fp32"
    values = [[point["perplexity"] for point in one.details["points"]] for one in (receipt, again)]
    assert values[0] == values[1]


# --- offloading


@pytest.mark.parametrize("where", [BlockPlacement(disk=(1,), may_map=False), BlockPlacement(resident=True)])
def test_an_offloaded_run_is_repeated(where: BlockPlacement, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    plan = offload_plan(session, folder, Goal(context=64), BUDGET, placement=where)
    events = list(run(session, plan, ["An old map"], GREEDY, raw=True))
    names = repeated(receipt_of(events))
    assert capsys.readouterr().out == "".join(event.text for event in events if isinstance(event, Chunk))
    same_plan(names["session"].plan, session.plan)


# --- files


def test_a_quantization_is_repeated(folder: str, tmp_path: Path) -> None:
    options, text = {"bits": 3, "group_size": 32}, {"samples": 4, "length": 32}
    request = QuantizeRequest.validated(folder, "gptq", options, text, out=tmp_path / "own", budget=BUDGET)
    names = repeated(receipt_of(quantize(request)))
    assert names["request"].budget == BUDGET
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "quantized" / name).read_bytes()


@pytest.mark.parametrize("options", [ExportOptions(precision="int4", group_size=16), ExportOptions(fused=False)])
def test_an_export_is_repeated(options: ExportOptions, folder: str, tmp_path: Path) -> None:
    receipt = receipt_of(export_model(ExportRequest(folder, tmp_path / "own", options, BUDGET, source="a name")))
    names = repeated(receipt)
    assert (names["request"].budget, names["request"].options) == (BUDGET, options)
    assert names["event"].details["parity"] == receipt.details["parity"]


def test_a_comparison_is_repeated(folder: str) -> None:
    options = MeasureOptions(tokens=64)
    receipt = receipt_of(
        compare(folder, parse_variants("rtn:4:32"), reference="fp32", options=options, budget=MemoryBudget.parse("2G"))
    )
    again = last(receipt)
    rows = [[(r["variant"], r["perplexity"], r["kl"]) for r in one.details["rows"]] for one in (receipt, again)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert "2000000000" in receipt.snippet.replace("_", "")


def test_a_sweep_is_repeated(folder: str) -> None:
    grid = Grid((folder,), tuple(parse_variants("rtn:4:32")), parse_variant("fp32"), options=MeasureOptions(tokens=64))
    receipt = receipt_of(sweep(grid, budget=MemoryBudget.parse("2G")))
    names = repeated(receipt)
    assert names["grid"] == grid
    assert names["budget"] == MemoryBudget.parse("2G")
    assert names["event"].details["rows"] == receipt.details["rows"]


def test_the_code_of_a_budget_without_limits_is_that_of_no_limits() -> None:
    from lowmem.fields import arguments

    assert eval(f"MemoryBudget({arguments(UNLIMITED.as_dict())})") == UNLIMITED
