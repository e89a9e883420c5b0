"""Verify on the page: claims as HTML, the report in a file, long set-ups for the owner alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toys

from lowmem.errors import BadInput, NotAllowed
from lowmem.events import CancelToken, Receipt
from lowmem.longctx import needle
from lowmem.runtime.session import Session
from lowmem.ui.html.verify import verified
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.verify import VerifyService
from lowmem.verify.claims import Claim
from tests.test_session import planned


def test_claims_are_escaped_and_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    claims = [Claim("load", "passed", "fine"), Claim("kl", "failed", "<script>alert(1)</script>")]
    html = verified(claims, Receipt("verify", "toy", "fp32", "cpu", 1.0, details={"file": str(report)}))
    assert "<script>" not in html
    assert "1 of the claims do not hold" in html
    assert "report.json" in html
    assert verified([], None) == ""


def test_the_service_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle, "recall", lambda *_, **__: needle.Recall(64, 0.9, 0.1))
    session = Session()
    list(session.load(planned(session, toys.save_toy("llama", tmp_path))))
    engine = Engine(lambda: session)
    assert engine.session is session
    *_, receipt = VerifyService(engine).verify(CancelToken())
    report = json.loads(Path(receipt.details["file"]).read_text())
    assert {claim["key"] for claim in report["claims"]} >= {"load", "answer", "decode", "recall"}
    assert engine.last_receipt is receipt


def test_nothing_loaded_is_a_sentence() -> None:
    with pytest.raises(BadInput, match="No model is loaded"):
        VerifyService(Engine(Session)).verify(CancelToken())


def test_visitors_verify_short_contexts_only(tmp_path: Path) -> None:
    session = Session()
    list(session.load(planned(session, toys.save_toy("llama", tmp_path))))
    engine = Engine(lambda: session, access=Access(public=True))
    assert engine.session is session
    object.__setattr__(session.plan, "context", 100_000)
    with pytest.raises(NotAllowed, match="100,000"):
        VerifyService(engine).verify(CancelToken())
