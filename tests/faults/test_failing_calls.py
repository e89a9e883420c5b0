"""Whichever call of an action fails: it ends well or in one sentence, nothing half-made is left, and the next run succeeds.

A few calls of each kind here; LOWMEM_EVERY_CALL=1 lets every single one fail.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest

from faults.failing_calls import ACTIONS, FAULTS, Outcome, served

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)

EVERY = bool(os.environ.get("LOWMEM_EVERY_CALL"))
MOST = 0 if EVERY else 3
SLOW = ("export generic",)
"""Several seconds a run."""


@pytest.fixture(scope="module")
def fail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Outcome]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        with served(tmp_path_factory.mktemp("faults")) as ask:
            yield ask


@pytest.mark.timeout(7200 if EVERY else 600)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("action", [name for name in ACTIONS if EVERY or name not in SLOW])
def test_whichever_call_fails(fail: Callable[..., list[Outcome]], action: str, fault: str) -> None:
    for outcome in fail(action, fault, MOST):
        assert outcome.ended in ("finished", "refused"), outcome.said
        assert not outcome.problems, outcome
        assert len(outcome.said) < 500
        assert "\n" not in outcome.said
