"""Stop at random moments of everything that takes long: the lane is free within a second, and the memory is back.

A few moments here; LOWMEM_MOMENTS=50 tries fifty of each action.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import fake_hub
import psutil
import pytest
import toys

from lowmem.errors import Cancelled
from lowmem.events import CancelToken, Receipt
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_isolated
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.machine.monitor import release_memory
from lowmem.models.fetch import fetch
from lowmem.models.source import read_spec
from lowmem.offload.run import BlockPlacement, plan_for
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.plan import Plan
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.run import quantize_isolated
from lowmem.runtime.remote import WorkerSession
from lowmem.ui.service.access import OWNER
from lowmem.ui.service.lane import Lane

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")

MOMENTS = int(os.environ.get("LOWMEM_MOMENTS", "2"))
FREE_SECONDS = 1.0
BACK = 0.02
"""Share of the memory held before that may be held more afterwards."""

SETTLE_SECONDS = 2.0
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
ANSWER = GenerateOptions(greedy=True, max_new_tokens=300)
ROWS = GenerateOptions(greedy=True, max_new_tokens=60)


class Setting(NamedTuple):
    """What the actions work on: a model's folder, a session that runs it, and a folder for results."""

    folder: Path
    session: WorkerSession
    out: Path


Action = Callable[[Setting, CancelToken], Iterator[Any]]


def generate(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return given.session.generate("Once", ANSWER, cancel, raw=True)


def batch(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return given.session.batch([f"Number {n}" for n in range(12)], ROWS, cancel, raw=True, batch_size=4)


def perplexity(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return given.session.run(actions.sliding_perplexity, TEXT, 128, 16, cancel=cancel)


def hidden_states(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return given.session.run(actions.hidden_states, TEXT, 128, 16, given.out / "states.npy", cancel=cancel)


def quantize(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    text = {"samples": 24, "length": 256}
    return quantize_isolated(
        QuantizeRequest.validated(str(given.folder), "gptq", {"group_size": 32}, text, out=given.out / "quantized"),
        cancel,
    )


def export(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return export_isolated(
        ExportRequest(str(given.folder), given.out / "exported", ExportOptions(precision="int8")), cancel
    )


def fetch_slowly(_given: Setting, cancel: CancelToken) -> Iterator[Any]:
    return fetch("acme/toy", cancel)


def load(given: Setting, cancel: CancelToken) -> Iterator[Any]:
    session = WorkerSession()
    placement = BlockPlacement(disk=(0, 1), may_map=False)
    try:
        yield from session.load(plan_for(session, str(given.folder), Goal(context=64), placement=placement), cancel)
    finally:
        assert cancel.cancelled is (session.plan is None) or session.plan is not None
        session.unload()


ON_THE_MODEL = (generate, batch, perplexity, hidden_states)
ACTIONS = (*ON_THE_MODEL, quantize, export, fetch_slowly, load)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[WorkerSession]:
    running = WorkerSession()
    list(running.load(_planned(running, folder)))
    yield running
    running.unload()


def _planned(session: WorkerSession, folder: Path) -> Plan:
    return session.plan_for(read_spec(str(folder)), Goal(context=512, precision="fp32", backend="torch"))


@pytest.fixture
def hub(online: None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_hub.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.add("acme/toy", {file.name: file.read_bytes() for file in folder.iterdir()})
        server.stall_seconds = 1.0
        yield


def held() -> int:
    """Bytes of this process and its children."""
    release_memory()
    own, total = psutil.Process(), 0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            memory = process.memory_full_info()
            total += memory.uss
    return total


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.__name__)
@pytest.mark.usefixtures("hub")
def test_stop(action: Action, folder: Path, session: WorkerSession, tmp_path: Path) -> None:
    lane, drawn = Lane(), random.Random(action.__name__)
    runs = range(2 if action in ON_THE_MODEL else 1)  # the first imports what the others find
    seconds = [_until_the_end(lane, action, Setting(folder, session, _fresh(tmp_path, n)), None)[0] for n in runs]
    before = held()
    for moment in range(MOMENTS):
        after = drawn.uniform(0, min(seconds))
        waited, finished = _until_the_end(lane, action, Setting(folder, session, _fresh(tmp_path, 2 + moment)), after)
        assert waited < FREE_SECONDS, f"stopped after {after:.3f} s"
        deadline = time.monotonic() + SETTLE_SECONDS
        while (now := held()) > before * (1 + BACK) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert now <= before * (1 + BACK), f"stopped after {after:.3f} s: {before / 1e6:.1f} MB became {now / 1e6:.1f}"
        results = [path for path in (tmp_path / str(2 + moment)).rglob("*") if path.suffix in (".npy", ".onnx")]
        assert finished or not results
    assert session.plan is not None


def _fresh(tmp_path: Path, n: int) -> Path:
    """A folder for results and downloads of its own."""
    os.environ["LOWMEM_HOME"] = str(tmp_path / str(n) / "home")
    (tmp_path / str(n)).mkdir()
    return tmp_path / str(n)


def _until_the_end(lane: Lane, action: Action, given: Setting, stop_after: float | None) -> tuple[float, bool]:
    """Seconds until the lane is free, from the start or from Stop, and whether the action was finished by then."""
    cancel, pressed, last = CancelToken(), [time.monotonic()], None

    def press() -> None:
        pressed[0] = time.monotonic()
        cancel.set()

    timer = threading.Timer(stop_after, press) if stop_after is not None else None
    events = lane.in_turn(OWNER, action(given, cancel), cancel)
    if timer:
        timer.start()
    with suppress(Cancelled):
        for event in events:
            last = event
    ended = time.monotonic()
    if timer:
        timer.cancel()
    assert lane._running is None
    return ended - pressed[0] if not timer or cancel.cancelled else 0.0, isinstance(last, Receipt)
