"""The planner's choice of a backend, and a session that exports once and runs what is exported."""

from __future__ import annotations

import dataclasses
import time
from itertools import islice
from pathlib import Path

import packed_toys
import pytest
import toys

from lowmem.errors import BadInput, Cancelled, Unsupported
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.models.catalog import find
from lowmem.models.source import read_spec
from lowmem.planning import exported, planner
from lowmem.planning.estimate import reestimate
from lowmem.planning.fallback import fewer_bits, quantized_kv
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.placement import all_resident
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.runtime.onnx import loader as onnx_loader
from lowmem.runtime.onnx.manifest import DATA
from lowmem.runtime.session import Session
from lowmem.settings import settings
from lowmem.units import MB

DEMO = find("demo").spec()


@pytest.fixture(autouse=True)
def _toys_are_worth_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "GRAPH_PARAMETERS", 1)


def test_who_did_not_ask_gets_no_graph_that_is_not_worth_writing(made_up, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "GRAPH_PARAMETERS", DEMO.parameters + 1)
    assert chosen(made_up()).backend == "torch"
    assert chosen(made_up(), backend="onnx").backend == "onnx"


def test_writing_keeps_the_budget_too(made_up) -> None:
    assert chosen(made_up(ram_gb=1.6)).verdict == "fits"
    assert chosen(made_up(ram_gb=1.6)).backend == "torch"


def test_what_a_graph_cannot_do_makes_a_plan_for_torch(made_up) -> None:
    best = chosen(made_up())
    for change in ({"window": 512}, {"cache_type": "int4"}, {"placement": all_resident(DEMO, "cpu")}):
        assert reestimate(best, **change).backend == "torch"
    assert reestimate(best, cache_type="none").backend == "onnx"


def chosen(hardware, spec=DEMO, **goal) -> Plan:
    return plan(spec, hardware, MemoryBudget.detect(hardware), Goal(**goal))


def test_on_a_cpu_the_fastest_backend_that_fits_is_chosen_and_said(made_up) -> None:
    best = chosen(made_up())
    assert (best.backend, best.precision, best.or_torch) == ("onnx", "int8", True)
    assert "ONNX Runtime" in best.reason
    assert any("torch decodes several times slower" in declined.reason for declined in best.declined)


def test_elsewhere_torch_runs(made_up) -> None:
    assert chosen(made_up(vram_gb=16)).backend == "torch"
    assert chosen(made_up(), backend="torch").backend == "torch"
    assert chosen(made_up(), cache_type="int8").backend == "torch"
    assert chosen(made_up(), precision="int8").backend == "torch"
    assert (
        chosen(made_up(), find("openai-community/gpt2").spec() if find("openai-community/gpt2") else _gpt2()).backend
        == "torch"
    )


def _gpt2():
    from dataclasses import replace

    return replace(DEMO, model_type="gpt2")


def test_int4_means_a_graph(made_up) -> None:
    small = chosen(made_up(), precision="int4")
    assert (small.backend, small.or_torch) == ("onnx", False)
    assert small.main.share("weights") < chosen(made_up()).main.share("weights")
    with pytest.raises(BadInput, match="CPUs"):
        chosen(made_up(vram_gb=16), precision="int4")


def test_what_onnx_cannot_do_is_refused_in_a_sentence(made_up) -> None:
    for goal, words in (
        ({"precision": "nf4"}, "fp32, int8, int4"),
        ({"cache_type": "int8"}, "fp32 KV cache"),
    ):
        with pytest.raises(Unsupported, match=words):
            chosen(made_up(), backend="onnx", **goal)
    with pytest.raises(Unsupported, match="on the CPU"):
        chosen(made_up(vram_gb=16), backend="onnx")
    with pytest.raises(BadInput, match="no backend"):
        chosen(made_up(), backend="jax")


def test_the_ladder_leaves_the_graph(made_up) -> None:
    best = chosen(made_up())
    assert quantized_kv(best) is None
    lower = fewer_bits(best)
    assert lower is None or lower.backend == "torch"


def test_a_longer_context_costs_what_the_cache_takes(made_up) -> None:
    short, long = (chosen(made_up(), context=context) for context in (1024, 2048))
    assert long.main.share("kv") == 2 * short.main.share("kv") == exported.kv_bytes(DEMO, 2048, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("toy") / "m")


def load(session: Session, ref: str, **goal) -> list[Step | Receipt]:
    hardware = session.hardware()
    best = plan(read_spec(ref), hardware, MemoryBudget.detect(hardware), Goal(context=256, **goal))
    return list(session.load(best))


def answer(session: Session, **options) -> str:
    events = session.generate("Hello", GenerateOptions(max_new_tokens=12, **options), raw=True)
    return "".join(event.text for event in events if isinstance(event, Chunk))


def kept_graphs() -> list[Path]:
    """All that lies where graphs are kept, but for locks."""
    return [path for path in (settings().home / "graphs").glob("*") if not path.name.startswith(".")]


def test_a_session_exports_once(folder: Path) -> None:
    session = Session()
    steps = load(session, str(folder))
    assert any(isinstance(step, Step) and "graph, once" in step.note for step in steps)
    assert session.plan is not None
    assert session.plan.backend == "onnx"
    graphs = kept_graphs()
    assert len(graphs) == 1
    again = load(Session(), str(folder))
    assert not any(isinstance(step, Step) and "once" in step.note for step in again)
    (graphs[0] / DATA).write_bytes(b"cut short")
    healed = load(Session(), str(folder))
    assert any(isinstance(step, Step) and "once" in step.note for step in healed)


def test_all_options_work_on_a_graph(folder: Path) -> None:
    graph, torch = Session(), Session()
    load(graph, str(folder), backend="onnx", precision="fp32")
    load(torch, str(folder), backend="torch", precision="fp32")
    for options in (
        {"greedy": True},
        {"seed": 3, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
        {"greedy": True, "use_cache": False},
        {"seed": 5, "num_return_sequences": 3},
        {"greedy": True, "stop": ("a", "e")},
    ):
        assert answer(graph, **options) == answer(torch, **options)
    prompts = ["Hi", "A much longer prompt than the first", "Three"]
    done = [
        [
            (c.index, c.text)
            for c in session.batch(prompts, GenerateOptions(greedy=True, max_new_tokens=6), raw=True)
            if isinstance(c, Completion)
        ]
        for session in (graph, torch)
    ]
    assert done[0] == done[1]


def test_an_exported_folder_is_a_model_by_its_path(folder: Path, tmp_path: Path) -> None:
    list(export_model(ExportRequest(str(folder), tmp_path / "out", ExportOptions(precision="int4"))))
    spec = read_spec(str(tmp_path / "out"))
    assert spec.exported == "int4"
    assert spec.size_on_disk == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.onnx*"))
    session = Session()
    load(session, str(tmp_path / "out"))
    assert session.plan is not None
    assert (session.plan.precision, session.plan.backend) == ("int4", "onnx")
    assert len(answer(session, greedy=True)) > 0
    with pytest.raises(Unsupported, match="exported graph"):
        load(session, str(tmp_path / "out"), precision="fp32")


def test_a_quantized_checkpoint_runs_as_stored_on_a_graph(folder: Path, tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path / "gptq", packed_toys.Recipe())
    session = Session()
    load(session, str(tmp_path / "gptq"))
    assert session.plan is not None
    assert (session.plan.precision, session.plan.backend) == ("stored", "onnx")
    assert len(answer(session, greedy=True)) > 0


def test_torch_takes_over_when_no_graph_comes_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> object:
        raise Unsupported("The graph failed the parity check.", "Choose another precision.")
        yield

    monkeypatch.setattr(onnx_loader, "graph_folder", fails)
    session = Session()
    *_, receipt = load(session, str(folder))
    assert isinstance(receipt, Receipt)
    assert session.plan is not None
    assert session.plan.backend == "torch"
    assert any("failed the parity check" in note for note in receipt.notes)
    with pytest.raises(Unsupported):
        load(session, str(folder), backend="onnx")


def test_torch_takes_over_where_only_torch_can(folder: Path) -> None:
    session = Session()
    load(session, str(folder))
    steps = list(session.generate("Hello", GenerateOptions(max_new_tokens=4, window=32), raw=True))
    assert any(isinstance(step, Step) and "Loading for torch" in step.note for step in steps)
    assert session.plan is not None
    assert (session.plan.backend, session.plan.precision) == ("torch", "int8")
    load(session, str(folder), backend="onnx")
    with pytest.raises(Unsupported, match="has no window"):
        answer(session, window=32)
    with pytest.raises(Unsupported, match="does not expose its layers"):
        list(session.work("Looking", lambda *_: iter(()), CancelToken()))


def test_a_graph_is_written_within_the_budget_or_not_at_all(folder: Path) -> None:
    hardware, session = Session().hardware(), Session()
    best = plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    tight = dataclasses.replace(best, budget=MemoryBudget(hardware.process_bytes + 100 * MB))
    receipt = list(session.load(tight))[-1]
    assert session.plan is not None
    assert session.plan.backend == "torch"
    assert any("Torch runs it" in note for note in receipt.notes)


def test_stop_while_a_graph_is_written_is_heard_and_leaves_nothing(folder: Path) -> None:
    hardware, session, cancel = Session().hardware(), Session(), CancelToken()
    best = plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    stopped: list[float] = []

    def load_until_it_is_half_written() -> None:
        for _ in session.load(best, cancel):
            if not stopped and any(path.suffix == ".part" for path in kept_graphs()):
                cancel.set()
                stopped.append(time.monotonic())

    with pytest.raises(Cancelled):
        load_until_it_is_half_written()
    assert time.monotonic() - stopped[0] < 2
    assert kept_graphs() == []
    assert session.plan is None
    again = list(session.load(best))
    assert any(isinstance(event, Step) and "graph, once" in event.note for event in again)
    assert session.plan is not None
    assert session.plan.backend == "onnx"


def test_who_wants_a_graph_that_another_is_writing_waits_for_it(folder: Path) -> None:
    hardware, session = Session().hardware(), Session()
    best = plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    cancel = CancelToken()
    writing = onnx_loader.graph_folder(best, folder, cancel)
    next(writing)
    loading = session.load(best)
    assert any(isinstance(step, Step) and "Waiting for another process" in step.note for step in islice(loading, 8))
    list(writing)
    assert not any(isinstance(step, Step) and "graph, once" in step.note for step in list(loading))
    assert session.plan is not None
    assert session.plan.backend == "onnx"


def test_int4_says_what_it_costs_and_what_is_better(made_up) -> None:
    asked = chosen(made_up(), precision="int4")
    assert "KL 0.22" in asked.reason
    assert "AWQ or GPTQ" in asked.reason
    for unasked in (chosen(made_up()), chosen(made_up(), backend="onnx")):
        assert unasked.precision == "int8"
        assert "small loss" in unasked.reason
