"""Jobs in child processes: what comes back, what a death looks like, how Stop and limits end them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from lowmem.errors import BadInput, Cancelled, DiskFull, OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.monitor import PeakMeter
from lowmem.units import MB


def counting(upto: int) -> Iterator[Step]:
    print("This is not part of the protocol.", flush=True)
    for number in range(upto):
        yield Step(number, upto, f"Number {number}", "B")
    return {"upto": upto, "process": os.getpid()}


def refused() -> Iterator[Step]:
    yield Step(0, 1, "Looking")
    raise DiskFull("12 GB are missing.", "Free some space.")


def broken() -> Iterator[Step]:
    yield Step(0, 1, "Dividing")
    raise ZeroDivisionError("this is a bug")


def exiting(status: int) -> Iterator[Step]:
    yield Step(0, 1, "Leaving")
    os._exit(status)


def killed() -> Iterator[Step]:
    yield Step(0, 1, "Growing")
    os.kill(os.getpid(), signal.SIGKILL)


def without_memory() -> Iterator[Step]:
    yield Step(0, 1, "Growing")
    raise MemoryError


def hanging(pid_file: str, deaf: bool = False) -> Iterator[Step]:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(pid_file).write_text(str(os.getpid()))
    yield Step(0, 1, "Hanging")
    time.sleep(600)


def filling(megabytes: int) -> Iterator[Step]:
    with PeakMeter():  # whose beginning and end reset the kernel's mark
        held = b"x" * (megabytes * MB)
        yield Step(0, 1, f"Holding {len(held)}")
        del held
    with PeakMeter():
        yield Step(1, 1, "Holding nothing")


def growing(megabytes: int, peak_file: str) -> Iterator[Step]:
    held = []
    yield Step(0, 0, "Growing")
    try:
        while True:
            held.append(b"x" * (megabytes * MB))
    except MemoryError:
        held.clear()
        status = Path("/proc/self/status").read_text()
        Path(peak_file).write_text(status[status.index("VmHWM:") :].split()[1])
        raise


def run(job: Callable[..., Any], **arguments: Any) -> tuple[list[Step], Finished]:
    *steps, finished = run_isolated(f"{__name__}:{job.__name__}", arguments)
    assert isinstance(finished, Finished)
    return steps, finished


def test_steps_and_the_result_come_back_and_prints_do_not_disturb():
    steps, finished = run(counting, upto=3)
    assert steps == [Step(number, 3, f"Number {number}", "B") for number in range(3)]
    assert finished.value["upto"] == 3
    assert finished.value["process"] != os.getpid()
    assert finished.seconds > 0


def test_an_error_for_people_keeps_its_kind_and_words():
    with pytest.raises(DiskFull) as caught:
        run(refused)
    assert (caught.value.message, caught.value.hint) == ("12 GB are missing.", "Free some space.")


def test_a_bug_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match="ZeroDivisionError: this is a bug") as caught:
        run(broken)
    assert "in broken" in str(caught.value)


def test_a_wrong_argument_is_a_bug_too():
    with pytest.raises(RuntimeError, match="unexpected keyword"):
        run(counting, down_to=3)


def test_a_killed_child_ran_out_of_memory():
    with pytest.raises(OutOfMemory, match=r"The system killed the job, when it had used up to .* [MG]B") as caught:
        run(killed)
    assert caught.value.hint


@pytest.mark.parametrize("status", [0, 7])
def test_a_child_that_ends_without_a_result_is_not_a_success(status):
    with pytest.raises(OutOfMemory, match=f"without a result \\(status {status}\\)"):
        run(exiting, status=status)


def test_running_out_of_memory_within_python():
    with pytest.raises(OutOfMemory, match=r"Memory ran out at \d"):
        run(without_memory)


@pytest.mark.parametrize("deaf", [False, True])
def test_stop_ends_the_child_within_a_second(tmp_path, deaf):
    cancel, pid_file = CancelToken(), tmp_path / "pid"
    events = run_isolated(f"{__name__}:hanging", {"pid_file": str(pid_file), "deaf": deaf}, cancel)
    assert next(events) == Step(0, 1, "Hanging")
    pressed: list[float] = []
    threading.Timer(0.1, lambda: (cancel.set(), pressed.append(time.monotonic()))).start()
    with pytest.raises(Cancelled):
        next(events)
    assert time.monotonic() - pressed[0] < 1.0
    assert not psutil.pid_exists(int(pid_file.read_text()))


def test_stop_before_the_start_starts_nothing(tmp_path):
    cancel = CancelToken()
    cancel.set()
    with pytest.raises(Cancelled):
        list(run_isolated(f"{__name__}:hanging", {"pid_file": str(tmp_path / "pid")}, cancel))
    assert not (tmp_path / "pid").exists()


def test_whoever_stops_listening_ends_the_child(tmp_path):
    with closing(run_isolated(f"{__name__}:hanging", {"pid_file": str(tmp_path / "pid")})) as events:
        next(events)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_the_child_does_not_outlive_its_parent(tmp_path):
    code = (
        "from lowmem.machine.isolated import run_isolated\n"
        f"for _ in run_isolated('{__name__}:hanging', {{'pid_file': {str(tmp_path / 'pid')!r}}}): print('on', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"on\n"
        parent.kill()
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 3
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        # An orphan's remains wait for whoever collects them, which in a container may be nobody.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark")
def test_the_peak_is_the_childs_own_whatever_meters_run_within():
    ballast = b"x" * (400 * MB)
    _, small = run(filling, megabytes=1)
    _, large = run(filling, megabytes=200)
    assert len(ballast) == 400 * MB
    assert small.peak_bytes["ram"] < 150 * MB
    assert large.peak_bytes["ram"] - small.peak_bytes["ram"] == pytest.approx(199 * MB, rel=0.05)
    assert large.kernel_peak_bytes > 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's high-water mark")
def test_the_limit_ends_a_job_that_holds_more():
    with pytest.raises(OutOfMemory, match="more than the budget of 120 MB"):
        list(run_isolated(f"{__name__}:filling", {"megabytes": 200}, budget=MemoryBudget(ram=120 * MB)))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a cap")
@pytest.mark.parametrize("megabytes", [1, 7, 64])
def test_no_job_passes_its_budget_even_between_two_checks(megabytes, tmp_path):
    peak, budget = tmp_path / "peak", 400 * MB
    arguments = {"megabytes": megabytes, "peak_file": str(peak)}
    with pytest.raises(OutOfMemory, match="more than the budget of 400 MB"):
        list(run_isolated(f"{__name__}:growing", arguments, budget=MemoryBudget(ram=budget)))
    assert budget - (megabytes + 20) * MB < 1024 * int(peak.read_text()) < 1.02 * budget


def test_what_json_cannot_carry_is_refused_before_anything_starts():
    with pytest.raises(TypeError):
        list(run_isolated(f"{__name__}:counting", {"upto": object()}))


def test_errors_have_their_class_even_in_a_second_generation():
    with pytest.raises(BadInput):
        run(second_generation)


def second_generation() -> Iterator[Step]:
    yield from (event for event in run_isolated(f"{__name__}:bad_input", {}) if isinstance(event, Step))


def bad_input() -> Iterator[Step]:
    yield Step(0, 1, "Reading")
    raise BadInput("No.", "Yes.")


def test_the_parent_needs_no_torch():
    code = "import sys, lowmem.machine.isolated, lowmem.measure.compare, lowmem.cli.compare, lowmem.plots.variants\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["False", "False"], done.stderr
