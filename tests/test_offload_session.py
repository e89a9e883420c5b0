"""Offloading by plan: what a session loads, predicts and answers when the budget is below the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import packed_toys
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowmem.errors import BadInput, CorruptModel, DoesNotFit
from lowmem.events import Chunk, Receipt
from lowmem.generate.options import GenerateOptions
from lowmem.machine import bandwidth, rates
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.offload.plans import largest_batch, parse_blocks, place_blocks, place_by_budget
from lowmem.offload.run import BlockPlacement, plan_for, run
from lowmem.planning.fallback import offload
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import TEMPLATE_PROCESS_BYTES
from lowmem.planning.offloading import smallest
from lowmem.planning.placement import Placement
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session

OPTIONS = GenerateOptions(max_new_tokens=6, greedy=True)
ALL = BlockPlacement(disk=(0, 1))


@pytest.fixture(autouse=True)
def _quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test measures its machine anew."""
    monkeypatch.setattr(bandwidth, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "PROBE_SECONDS", 0.01)


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.unload()


def direct(plan: Plan) -> Plan:
    """`plan` with its blocks read past the page cache, though the budget would hold them."""
    assert plan.placement is not None
    return dataclasses.replace(plan, placement=dataclasses.replace(plan.placement, mapped=False))


def answer(session: Session, plan: Plan) -> tuple[str, Receipt]:
    events = list(run(session, plan, ["An old map"], OPTIONS, raw=True, force=True))
    receipt = events[-1]
    assert isinstance(receipt, Receipt)
    return "".join(event.text for event in events if isinstance(event, Chunk)), receipt


def ids(session: Session) -> torch.Tensor:
    assert session._loaded is not None
    with torch.inference_mode():
        return session._loaded.model(torch.tensor([toys.prompt(12)])).logits


def stored_in(folder: Path, dtype: torch.dtype) -> None:
    """Round the folder's weights to a dtype, in place."""
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize("name", toys.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streamed_equals_all_at_home(name: str, dtype: torch.dtype, session: Session, tmp_path: Path) -> None:
    toys.save_toy(name, tmp_path)
    stored_in(tmp_path, dtype)
    goal = Goal(context=64, precision="fp32")
    home = plan_for(session, str(tmp_path), goal, placement=BlockPlacement(ram=()))
    text, _ = answer(session, home)
    expected = ids(session)
    for plan in (direct(plan_for(session, str(tmp_path), goal, placement=ALL)),
                 direct(plan_for(session, str(tmp_path), goal, placement=BlockPlacement(disk=(1,))))):  # fmt: skip
        streamed, receipt = answer(session, plan)
        assert streamed == text
        assert torch.equal(ids(session), expected)
        assert receipt.details["bytes_read"] >= 6 * receipt.details["bytes_per_token"] > 0


@pytest.mark.parametrize(
    "recipe",
    [
        packed_toys.Recipe(),
        packed_toys.Recipe(symmetric=False),
        packed_toys.Recipe(layout="gptq_v2", symmetric=False),
        packed_toys.Recipe(bits=8),
        packed_toys.Recipe(bits=3),
        packed_toys.Recipe(bits=2),
        packed_toys.Recipe(group=-1),
        packed_toys.Recipe(act_order=True),
        packed_toys.Recipe(layout="gemm", symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_blocks_stream_as_they_are_stored(
    name: str, recipe: packed_toys.Recipe, session: Session, tmp_path: Path
) -> None:
    dense = packed_toys.save(name, tmp_path, recipe)
    plan = plan_for(session, str(tmp_path), Goal(context=64), placement=ALL)
    assert plan.precision == "stored"
    assert plan.placement == Placement(("disk", "disk"))
    _, receipt = answer(session, plan)
    assert session._loaded is not None
    model, reference = session._loaded.model, dense.get_decoder()
    prompt = torch.tensor([toys.prompt(40)])
    with torch.inference_mode():
        # The head is int8 in both kinds of plans, so hidden states are compared: few rows, then many.
        for rows in (prompt[:, :5], prompt):
            states, expected = (m(rows).last_hidden_state for m in (model.get_decoder(), reference))
            assert (states - expected).norm() < 0.03 * expected.norm()
    assert receipt.new_tokens > 0


def test_mapped_where_the_budget_holds_the_model(session: Session, tmp_path: Path) -> None:
    toys.save_toy("llama", tmp_path)
    plan = plan_for(session, str(tmp_path), Goal(context=64), placement=ALL)
    assert plan.placement is not None
    assert plan.placement.mapped
    text, receipt = answer(session, plan)
    assert (text, receipt.details["bytes_read"]) != ("", None)
    assert text == answer(session, direct(plan))[0]


def test_a_file_cut_short_ends_the_answer_and_the_session_goes_on(session: Session, tmp_path: Path) -> None:
    plan = direct(plan_for(session, str(toys.save_toy("llama", tmp_path)), Goal(context=64), placement=ALL))
    text, _ = answer(session, plan)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptModel):
        answer(session, plan)
    assert session.busy == ""
    file.write_bytes(content)
    session.unload()
    assert answer(session, plan)[0] == text


def big(made: Plan, ram: int) -> Plan:
    return dataclasses.replace(made, budget=MemoryBudget(ram))


@pytest.fixture
def seven_billion(session: Session) -> Plan:
    from lowmem.models.catalog import synthetic
    from lowmem.planning.planner import plan

    spec = synthetic(layers=32, hidden=4096, intermediate=11008, heads=32, dtype="fp16", vocab=32_000)
    return plan(spec, session.hardware(), MemoryBudget(3_000_000_000), Goal(context=64, precision="fp32"))


def test_as_many_blocks_stay_as_the_budget_holds(seven_billion: Plan) -> None:
    counts = []
    for ram in (3_000_000_000, 6_000_000_000, 10_000_000_000, 40_000_000_000):
        made = place_by_budget(big(seven_billion, ram))
        assert made.verdict != "over"
        assert made.placement is not None
        counts.append(made.placement.blocks.count("ram"))
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[-1] == 32


def test_a_small_budget_does_not_change_the_precision(session: Session, tmp_path: Path) -> None:
    folder = str(toys.save_toy("llama", tmp_path))
    held = session.hardware().runtime_bytes + TEMPLATE_PROCESS_BYTES
    plans = [
        plan_for(session, folder, Goal(context=64), MemoryBudget(ram))
        for ram in (held + 6_000_000, held + 3_000_000_000)
    ]
    assert {plan.precision for plan in plans} == {session.hardware().cpu.dtypes[0]}


def test_a_budget_below_the_smallest_names_the_number_that_would_do(seven_billion: Plan) -> None:
    with pytest.raises(DoesNotFit, match="Even block by block") as refused:
        place_by_budget(big(seven_billion, 700_000_000))
    least = smallest(seven_billion).main.peak
    assert place_by_budget(big(seven_billion, int(least * 1.01))).verdict != "over"
    assert "Raise the budget to at least" in refused.value.hint


def test_the_rung_offloads_only_what_does_not_fit(seven_billion: Plan) -> None:
    lower = offload(seven_billion)
    assert lower is not None
    assert lower.placement is not None
    assert lower.verdict != "over"
    assert "on disk" in lower.reason


def test_a_graph_that_does_not_fit_is_offloaded_as_a_model(seven_billion: Plan) -> None:
    lower = offload(dataclasses.replace(seven_billion, precision="int8", backend="onnx", or_torch=True))
    assert lower is not None
    assert (lower.backend, lower.or_torch) == ("torch", False)


def test_the_rung_after_it_halves_what_stays(seven_billion: Plan) -> None:
    plan = place_by_budget(big(seven_billion, 10_000_000_000))
    counts = []
    while (lower := offload(plan)) is not None:
        assert lower.main.peak < plan.main.peak
        counts.append(lower.placement.blocks.count("ram"))  # type: ignore[union-attr]
        plan = lower
    assert counts[-1] == 0
    assert all(after == before // 2 for before, after in pairwise(counts))


def test_a_batch_grows_with_the_budget(seven_billion: Plan) -> None:
    sizes = [largest_batch(big(seven_billion, ram), place_by_budget).batch for ram in (3_000_000_000, 4_000_000_000)]
    assert 1 < sizes[0] < sizes[1]
    chosen_places = [
        largest_batch(big(seven_billion, ram), lambda plan: place_blocks(plan, Placement(("disk",) * 32))).batch
        for ram in (3_000_000_000, 9_000_000_000)
    ]
    assert 1 < chosen_places[0] < chosen_places[1]


def test_a_model_that_cannot_be_placed_has_no_batch(seven_billion: Plan) -> None:
    with pytest.raises(DoesNotFit):
        largest_batch(big(seven_billion, 700_000_000), place_by_budget)


def test_lists_of_blocks_are_read_and_refused() -> None:
    assert parse_blocks("0-2,5", 6) == (0, 1, 2, 5)
    assert parse_blocks("all", 3) == (0, 1, 2)
    assert parse_blocks(None, 3) is None
    for wrong in ("x", "3-1", "6", "1-9"):
        with pytest.raises(BadInput):
            parse_blocks(wrong, 6)


def test_a_disk_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path))
    file = tmp_path / "weights"
    file.write_bytes(bytes(8 << 20))
    first = bandwidth.disk_bandwidth(file)
    assert first > 1e6
    assert bandwidth.disk_bandwidth(file) == first
    bandwidth.disk_bandwidth(file, again=True)
    assert "disk" in (tmp_path / "rates.json").read_text()


def test_the_spec_of_a_folder_is_what_the_plan_counts(tmp_path: Path) -> None:
    spec = read_spec(str(toys.save_toy("gpt2", tmp_path)))
    from lowmem.planning.placement import stored_block_bytes

    blocks = [
        sum(t.nbytes for n, t in load_file(tmp_path / "model.safetensors").items() if f".h.{i}." in n) for i in (0, 1)
    ]
    assert stored_block_bytes(spec) == blocks


@pytest.mark.parametrize("method", ["int8_dynamic", "bnb"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_and_nf4_stream_as_they_are_stored(method: str, bits: int, session: Session, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    if (method, bits) == ("int8_dynamic", 4):
        pytest.skip("there is no such layout")
    from test_quant_own_layouts import quantize

    source, out = tmp_path / "source", tmp_path / "out"
    config = toys.config("llama")
    config.update({"intermediate_size": 128})  # rows are whole blocks of 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    toys.tokenizer().save_pretrained(source)
    quantize(source, out, (method, {} if method == "int8_dynamic" else {"bits": bits}))
    reference = session_states(
        Session(), plan_for(session, str(out), Goal(context=64), placement=BlockPlacement(disk=()))
    )
    states = session_states(session, plan_for(session, str(out), Goal(context=64), placement=ALL))
    assert (states - reference).norm() < 0.05 * reference.norm()


def session_states(session: Session, plan: Plan) -> torch.Tensor:
    answer(session, plan)
    assert session._loaded is not None
    with torch.inference_mode():
        states = session._loaded.model.get_decoder()(torch.tensor([toys.prompt(30)])).last_hidden_state
    session.unload()
    return states
