"""Checkpoints that are stored quantized, offloaded: every form in every placement runs, or is refused in one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import memlimit
import packed_toys
import pytest
import torch
import toys
from packed_toys import Recipe
from test_offload import on_fake_device
from test_quant_own_layouts import quantize
from transformers import AutoModelForCausalLM

from lowmem.errors import LowMemError, Unsupported
from lowmem.events import CancelToken, Chunk, Receipt
from lowmem.generate.options import GenerateOptions
from lowmem.machine import bandwidth, rates
from lowmem.models.synthetic import write_random_gptq
from lowmem.offload.run import BlockPlacement, job, placement_of, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.placement import Placement
from lowmem.runtime.session import Session
from lowmem.runtime.streaming.attach import Offloaded, apply
from lowmem.units import MB

OPTIONS = GenerateOptions(max_new_tokens=3, greedy=True)
FORMS = {
    "gptq4": Recipe(),
    "gptq8": Recipe(bits=8),
    "gptq3": Recipe(bits=3),
    "gptq2": Recipe(bits=2),
    "gptq_v2": Recipe(layout="gptq_v2", symmetric=False),
    "act-order": Recipe(act_order=True),
    "awq": Recipe(layout="gemm", symmetric=False),
    "int8": ("int8_dynamic", {}),
    "bnb8": ("bnb", {"bits": 8}),
    "nf4": ("bnb", {"bits": 4}),
}
PLACES = {
    "auto": None,
    "half": BlockPlacement(disk=(1,)),
    "disk": BlockPlacement(disk=(0, 1)),
    "past the cache": BlockPlacement(disk=(0, 1), may_map=False),
    "resident": BlockPlacement(resident=True),
}


@pytest.fixture(autouse=True)
def _quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "PROBE_SECONDS", 0.01)


@pytest.fixture(scope="module", params=FORMS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy in one of the forms."""
    form, folder = FORMS[request.param], tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    if isinstance(form, Recipe):
        packed_toys.save("llama", folder, form)
        return folder
    if form[0] == "bnb":
        pytest.importorskip("bitsandbytes")
    config = toys.config("llama")
    config.update({"intermediate_size": 128})  # rows are whole blocks of 64
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "source")
    toys.tokenizer().save_pretrained(folder / "source")
    quantize(folder / "source", folder / "out", form)
    return folder / "out"


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.unload()


def states(session: Session) -> torch.Tensor:
    assert session._loaded is not None
    with torch.inference_mode():
        return session._loaded.model.get_decoder()(torch.tensor([toys.prompt(20)])).last_hidden_state


def test_every_placement_runs_and_computes_the_same(packed: Path, session: Session) -> None:
    found = {}
    for name, places in PLACES.items():
        plan = plan_for(session, str(packed), Goal(context=64), placement=places)
        assert plan.precision == "stored"
        *events, receipt = run(session, plan, ["An old map"], OPTIONS, raw=True)
        assert isinstance(receipt, Receipt)
        assert receipt.details["predicted_seconds_per_token"] > 0
        assert any(isinstance(event, Chunk) for event in events)
        found[name] = states(session)
    for name, result in found.items():
        assert (result - found["resident"]).norm() < 0.05 * found["resident"].norm(), name


def test_they_pass_through_device_buffers_as_on_a_gpu(packed: Path, session: Session) -> None:
    plan = plan_for(session, str(packed), Goal(context=64), placement=PLACES["past the cache"])
    list(session.load(plan))
    expected, loaded = states(session), session._loaded
    assert loaded is not None
    assert loaded.streamer is not None
    on_fake_device(loaded.model, Offloaded(loaded.model, loaded.streamer, {}, {}, packed, {}), [0])
    assert torch.equal(states(session), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "nf4"])
def test_another_precision_is_refused(precision: str, packed: Path, session: Session) -> None:
    with pytest.raises(LowMemError, match="it runs as stored, not in"):
        plan_for(session, str(packed), Goal(context=64, precision=precision), placement=PLACES["disk"])


def test_the_reference_refuses_them(packed: Path) -> None:
    with pytest.raises(Unsupported, match="cannot offload quantized checkpoints"):
        list(job(str(packed), "accelerate", "An old map", 3, {}))
    assert placement_of("accelerate", 2).disk == (0, 1)


def test_a_live_quantized_model_is_not_offloaded(packed: Path, session: Session) -> None:
    list(session.load(plan_for(session, str(packed), Goal(context=64), placement=PLACES["resident"]), CancelToken()))
    assert session._loaded is not None
    with pytest.raises(Unsupported, match="cannot be moved once they are loaded"):
        apply(session._loaded.model, packed, Placement(("disk", "disk")))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_model_that_was_quantized_while_it_was_loaded_is_not_moved(
    precision: str, session: Session, tmp_path: Path
) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    toys.save_toy("llama", tmp_path)
    goal = Goal(context=64, precision=precision)
    list(session.load(plan_for(session, str(tmp_path), goal, placement=PLACES["resident"])))
    assert session._loaded is not None
    with pytest.raises(Unsupported, match="cannot be moved once they are loaded"):
        apply(session._loaded.model, tmp_path, Placement(("disk", "disk")))


def test_more_than_the_budget_holds_runs_within_it(tmp_path: Path, limited: Callable[..., memlimit.Result]) -> None:
    """540 MB of 4-bit codes where 250 MB are left for them: nobody is killed, and the peak is the predicted one."""
    toys.tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_random_gptq(
        tmp_path / "model", layers=16, hidden=2048, intermediate=8192, heads=16, vocab=toys.VOCABULARY,
        tokenizer_from=tmp_path / "tokenizer",
    )  # fmt: skip
    command = [
        sys.executable, "-m", "lowmem", "offload", str(tmp_path / "model"), "--prompt", "An old map", "--raw",
        "--max-new-tokens", "3", "--context", "32", "--json",
    ]  # fmt: skip
    result = limited(1000 * MB, command, cwd=Path(__file__).parents[1])
    assert (result.rc, result.oom_killed) == (0, 0), result.stderr[-2000:]
    receipt = json.loads(result.stdout.splitlines()[-1])
    places = receipt["details"]["blocks"]
    assert 0 < places.count("disk") < 16
    assert receipt["new_tokens"] == 3
    assert receipt["measured"]["ram"] == pytest.approx(receipt["predicted"]["ram"], rel=0.1)
