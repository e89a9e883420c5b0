"""Verification: each claim measured against its prediction, a report to attach, a wrong prediction found."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import toys

from lowmem.__main__ import main
from lowmem.errors import Cancelled
from lowmem.events import CancelToken, Receipt, Step
from lowmem.longctx import needle
from lowmem.machine.budget import MemoryBudget
from lowmem.planning.plan import Plan
from lowmem.runtime.remote import WorkerSession
from lowmem.runtime.session import Session
from lowmem.verify import claims as claims_module
from lowmem.verify.claims import FAILED, PASSED, SKIPPED, Claim, VerifyOptions, fits, peaks
from lowmem.verify.run import verify
from tests.test_session import planned

QUICK = VerifyOptions(tokens=128, prompt_tokens=32, new_tokens=4, runs=1)
FLAGS = ["--tokens", "128", "--prompt-tokens", "32", "--new-tokens", "4", "--runs", "1", "--context", "256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own memory is measured by a child of several seconds; the default will do here."""
    monkeypatch.setattr("lowmem.cli.plan.measure_runtime_bytes", lambda: 0)


@pytest.fixture
def toys_weigh_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A toy is nothing beside the libraries, which this process imports on the way."""
    monkeypatch.setattr(claims_module, "OVERESTIMATE", 0.4)
    monkeypatch.setattr(claims_module, "UNDERESTIMATE", 0.2)


@pytest.fixture
def recalls(toys_weigh_little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights recall nothing."""
    monkeypatch.setattr(needle, "recall", lambda *_, **__: needle.Recall(64, 0.9, 0.1))


def by_key(claims: list[Claim]) -> dict[str, Claim]:
    return {claim.key: claim for claim in claims}


def verified(session: Session, plan: Plan) -> tuple[dict[str, Claim], Receipt]:
    events = list(verify(session, plan, QUICK))
    assert any(isinstance(event, Step) for event in events)
    return by_key([event for event in events if isinstance(event, Claim)]), events[-1]


@pytest.mark.usefixtures("recalls")
def test_every_claim_is_measured_and_reported(folder):
    session = Session()
    found, receipt = verified(session, planned(session, folder, precision="int8"))
    assert set(found) == {"load", "answer", "fits", "prefill", "decode", "kl", "recall"}
    assert {key: claim.sentence for key, claim in found.items() if claim.verdict == FAILED} == {}
    assert 0 < found["kl"].measured < 0.05
    assert found["kl"].verdict == PASSED
    report = json.loads(json.dumps(receipt.details))
    assert report["passed"] is True
    assert report["versions"].keys() >= {"lowmem", "python", "torch", "transformers"}
    assert report["machine"]["cores"] > 0
    assert report["plan"]["precision"] == "int8"
    assert len(report["claims"]) == len(found)
    assert "disk_path" not in report["machine"]


@pytest.mark.usefixtures("recalls")
def test_the_original_in_fp32_has_nothing_to_be_compared_with(folder):
    session = Session()
    found, receipt = verified(session, planned(session, folder))
    assert found["kl"].verdict == SKIPPED
    assert "fp32" in found["kl"].sentence
    assert receipt.details["passed"]


@pytest.mark.usefixtures("recalls")
def test_a_graph_is_checked_against_its_original_and_stays_loaded(folder):
    session = Session()
    found, _ = verified(session, planned(session, folder, precision="int8", backend="onnx"))
    assert found["parity"].verdict == PASSED
    assert found["kl"].verdict == PASSED
    assert found["recall"].verdict == PASSED
    assert session.plan.backend == "onnx"


def test_a_quantized_checkpoint_does_not_name_its_original(tmp_path):
    from lowmem.verify.run import original_of

    session = Session()
    plan = planned(session, toys.save_toy("llama", tmp_path))
    stored = type("Stored", (), {"spec": plan.spec, "precision": "stored", "backend": "torch"})
    assert "name it" in original_of(stored)
    assert original_of(stored, str(tmp_path)) == tmp_path


def test_a_wrong_prediction_is_a_failed_claim(folder, monkeypatch):
    """The receipt of an answer that was predicted at half of what it takes."""
    estimate = Session.estimate

    def halved(self, *arguments, **options):
        import dataclasses

        plan = estimate(self, *arguments, **options)
        low = [
            dataclasses.replace(
                one, lines=tuple(dataclasses.replace(line, count=line.count // 2) for line in one.lines)
            )
            for one in plan.estimates
        ]
        return dataclasses.replace(plan, estimates=tuple(low))

    monkeypatch.setattr(Session, "estimate", halved)
    session = Session()
    found, receipt = verified(session, planned(session, folder))
    assert found["answer"].verdict == FAILED
    assert found["answer"].error < -0.3
    assert receipt.details["passed"] is False
    assert receipt.notes


def test_a_peak_beyond_the_budget_is_a_failed_claim():
    receipt = Receipt("load", "toy", "fp32", "cpu", 1.0, predicted={"ram": 100}, measured={"ram": 101})
    claims = list(peaks("load", receipt))
    assert claims[0].verdict == PASSED
    assert [one.verdict for one in fits(claims, MemoryBudget(ram=101))] == [PASSED]
    assert [one.verdict for one in fits(claims, MemoryBudget(ram=90))] == [FAILED]


@pytest.mark.parametrize(("measured", "verdict"), [(100, PASSED), (96, PASSED), (94, FAILED), (103, FAILED)])
def test_a_peak_may_be_2_percent_above_and_5_below_its_prediction(measured, verdict):
    receipt = Receipt("load", "toy", "fp32", "cpu", 1.0, predicted={"ram": 100}, measured={"ram": measured})
    assert [claim.verdict for claim in peaks("load", receipt)] == [verdict]


@pytest.mark.usefixtures("recalls")
def test_the_command_writes_the_report_and_ends_with_0(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    assert main(["verify", str(folder), "--precision", "int8", "--out", str(out), *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert "Every claim that was measured holds" in printed
    assert str(out) in printed
    assert json.loads(out.read_text())["passed"] is True


@pytest.mark.usefixtures("toys_weigh_little")
def test_a_claim_that_does_not_hold_ends_the_command_with_1(folder, monkeypatch, capsys):
    monkeypatch.setattr(needle, "recall", lambda *_, **__: needle.Recall(64, 0.01, 0.01))
    assert main(["verify", str(folder), "--precision", "fp32", "--json", *FLAGS]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [claim["key"] for claim in report["claims"] if claim["verdict"] == FAILED] == ["recall"]


def test_stop_ends_it_within_a_second_and_the_model_stays(folder):
    session = WorkerSession()
    try:
        list(session.load(planned(session, folder, precision="int8")))
        for wait in (0.5, 2.5, 5.0):
            cancel = CancelToken()
            timer = threading.Timer(wait, cancel.set)
            timer.start()
            started = time.monotonic()
            try:
                for _ in verify(session, None, VerifyOptions(tokens=4096, runs=20), cancel=cancel):
                    pass
            except Cancelled:
                assert time.monotonic() - started - wait < 1.0
            timer.cancel()
            assert session.plan is not None
    finally:
        session.unload()
