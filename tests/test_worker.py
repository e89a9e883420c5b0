"""The model's own process: the same answers, nothing loaded here, and deaths that cost one answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import toys

from lowmem.errors import BadInput, Cancelled, OutOfMemory
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.offload.run import BlockPlacement, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.runtime.remote import Worker, WorkerSession
from lowmem.runtime.session import Session
from lowmem.units import MB

GREEDY = GenerateOptions(greedy=True, max_new_tokens=12)
ENDLESS = GenerateOptions(greedy=True, max_new_tokens=200, unbounded=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("model"))


def planned(session: Session, folder: Path) -> Plan:
    hardware = session.hardware()
    goal = Goal(context=256, precision="fp32", backend="torch")
    return plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), goal)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[WorkerSession]:
    """One worker for the tests that leave it alive."""
    session = WorkerSession()
    list(session.load(planned(session, folder)))
    yield session
    session.unload()


@pytest.fixture
def session(folder: Path) -> Iterator[WorkerSession]:
    fresh = WorkerSession()
    list(fresh.load(planned(fresh, folder)))
    yield fresh
    fresh.unload()


def texts(events: object) -> str:
    return "".join(event.text for event in events if isinstance(event, Chunk))  # type: ignore[attr-defined]


def answer_until_killed(session: WorkerSession, number: signal.Signals) -> None:
    for event in session.generate("Once", ENDLESS, raw=True):
        if isinstance(event, Chunk):
            os.kill(pid(session), number)


def pid(session: WorkerSession) -> int:
    assert session._worker is not None
    return session._worker.child.pid


def test_it_answers_as_the_session_in_this_process(running, folder):
    here = Session()
    list(here.load(planned(here, folder)))
    assert texts(running.generate("Once upon", GREEDY, raw=True)) == texts(here.generate("Once upon", GREEDY, raw=True))
    prompts = ["One", "and another"]
    rows = [
        [e.text for e in one.batch(prompts, GREEDY, raw=True) if isinstance(e, Completion)] for one in (running, here)
    ]
    assert rows[0] == rows[1]


def test_actions_of_other_modules_run_where_the_model_lives(running):
    text = "The quick brown fox jumps over the lazy dog. " * 5
    *_, receipt = running.run(actions.sliding_perplexity, text, 64, 32)
    assert isinstance(receipt, Receipt)
    assert receipt.details["perplexity"] > 1
    assert running.last_receipt != receipt  # such work leaves no receipt in the session, here as there


def test_the_peak_is_measured_in_both_processes(running):
    *_, receipt = running.generate("Once upon", GREEDY, raw=True)
    own = psutil.Process().memory_info().rss
    worker = psutil.Process(pid(running)).memory_info().rss
    assert receipt.measured["ram"] == pytest.approx(own + worker, rel=0.1)
    assert receipt.predicted["ram"] == pytest.approx(own + worker, rel=0.1)
    assert running.plan is not None
    assert running.hardware().process_bytes == pytest.approx(own + worker, rel=0.1)


def test_bytes_that_a_worker_streams_are_counted(session, folder):
    placement = BlockPlacement(disk=(0, 1), may_map=False)
    placed = plan_for(session, str(folder), Goal(context=64), placement=placement)
    *_, receipt = run(session, placed, ["Once"], GREEDY, raw=True)
    assert receipt.action == "offload"
    assert receipt.details["bytes_read"] > 0


def test_an_error_for_people_leaves_the_model_loaded(running):
    with pytest.raises(BadInput):
        list(running.generate("", GREEDY))
    assert running.plan is not None
    assert texts(running.generate("Once", GREEDY, raw=True))


def test_stop_ends_the_answer_and_keeps_the_worker(running):
    cancel, before = CancelToken(), pid(running)
    events = running.generate("Once", ENDLESS, cancel, raw=True)
    for event in events:
        if isinstance(event, Chunk):
            cancel.set()
    assert isinstance(event, Receipt)
    assert event.details["finish"] == ["cancelled"]
    assert texts(running.generate("Once", GREEDY, raw=True))
    assert pid(running) == before


def test_whoever_stops_listening_stops_the_answer(running):
    events = running.generate("Once", ENDLESS, raw=True)
    next(event for event in events if isinstance(event, Chunk))
    events.close()
    assert texts(running.generate("Once", GREEDY, raw=True))


def test_unloading_ends_the_process(session):
    worker = pid(session)
    receipt = session.unload()
    assert receipt is not None
    assert receipt.details["returned_share"] == 1
    assert not psutil.pid_exists(worker)
    assert session.plan is None
    with pytest.raises(BadInput, match="No model is loaded"):
        list(session.generate("Once", GREEDY))


def test_a_killed_worker_costs_one_answer_and_offers_the_next_step(session, folder):
    loaded = session.plan
    with pytest.raises(OutOfMemory, match=r"The system killed the model's process, when it had used up to .*B"):
        answer_until_killed(session, signal.SIGKILL)
    assert session.plan is None
    assert session.lost is not None
    assert session.lost.plan == loaded
    assert session.lost.fallback is not None
    assert session.lost.fallback.main.peak < session.lost.plan.main.peak
    list(session.load(planned(session, folder)))
    assert session.lost is None
    assert texts(session.generate("Once", GREEDY, raw=True))


def test_a_crash_within_a_kernel_is_told_from_a_kill(session):
    with pytest.raises(OutOfMemory, match=r"signal 11"):
        answer_until_killed(session, signal.SIGSEGV)


def test_a_worker_that_dies_between_two_answers_is_noticed(session):
    os.kill(pid(session), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while session.plan is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert session.plan is None
    assert session.lost is not None


def test_a_worker_killed_while_loading_is_followed_by_the_next_step(folder):
    session = WorkerSession()
    wanted, killed = planned(session, folder), False
    for event in session.load(wanted):
        if isinstance(event, Step) and "torch" in event.note and not killed:
            killed = True
            os.kill(pid(session), signal.SIGKILL)
    assert isinstance(event, Receipt)
    assert event.notes[0].startswith("The system killed the model's process")
    assert session.plan is not None
    assert session.plan.precision != wanted.precision
    session.unload()


def test_stop_while_loading_ends_the_worker_within_a_second(folder):
    session, cancel, pressed = WorkerSession(), CancelToken(), list[float]()
    events = session.load(planned(session, folder), cancel)
    next(event for event in events if "torch" in event.note)
    worker = psutil.Process(pid(session))
    worker.suspend()  # as if it were in a call that hears nothing
    threading.Timer(0.1, lambda: (cancel.set(), pressed.append(time.monotonic()))).start()
    with pytest.raises(Cancelled):
        list(events)
    assert time.monotonic() - pressed[0] < 1.5
    assert not worker.is_running()
    assert session.plan is None


def test_a_worker_dies_with_its_parent(folder):
    code = (
        "import sys, time\n"
        "from lowmem.runtime.remote import Worker\n"
        "print(Worker().child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 5
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_cannot_start_is_one_sentence(folder, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    session = WorkerSession()
    with pytest.raises(Exception, match="could not be started: Resource temporarily unavailable"):
        list(session.load(planned(session, folder)))
    assert session.plan is None


ENDPOINTS = """
import sys
from gradio_client import Client
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
model = sys.argv[1]
_, url, _ = build_ui().launch(prevent_thread_lock=True, quiet=True, **launch_options())
client = Client(url, verbose=False)
options = {"max_new_tokens": 4}
call = client.predict
call(model, precision="fp32", context=256, api_name="/plan")
call(model, precision="fp32", context=256, api_name="/load")
call("Once", options, api_name="/generate")
call("Once", api_name="/chat", options=options)
call(["One", "two"], options, api_name="/batch")
call("The quick brown fox. " * 8, window=32, stride=16, api_name="/perplexity")
call("The quick brown fox. " * 8, window=32, stride=16, api_name="/hidden_states")
call(model, method="rtn", bits=4, group_size=32, api_name="/quantize")
call("Once", model, new_tokens=2, disk_blocks="0", api_name="/offload")
call(api_name="/receipt")
call(api_name="/unload")
print("loaded:", *(name for name in ("torch", "transformers", "onnxruntime") if name in sys.modules))
"""


def test_no_endpoint_makes_the_page_s_process_import_torch(folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    environment["LOWMEM_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", ENDPOINTS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a cap")
def test_a_budget_that_moves_takes_the_cap_along(session):
    worker = psutil.Process(pid(session))
    assert session.plan is not None
    held = session.hardware().process_bytes
    session.set_budget(MemoryBudget(ram=held + 100 * MB))
    assert session.plan.budget.ram == held + 100 * MB
    time.sleep(0.3)
    limit = worker.rlimit(psutil.RLIMIT_DATA)[0]
    assert 0 < limit < held + 400 * MB
    session.set_budget(replace(session.plan.budget, ram=held + 200 * MB))
    time.sleep(0.3)
    assert worker.rlimit(psutil.RLIMIT_DATA)[0] - limit == pytest.approx(100 * MB, abs=10 * MB)


def test_a_worker_holds_nothing_before_its_first_call():
    worker = Worker()
    try:
        time.sleep(1.0)
        assert worker.alive
        assert worker.resident_bytes() < 120 * MB
    finally:
        worker.end()
