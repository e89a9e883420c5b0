"""Children end with their parent, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from lowmem.background import run_child
from lowmem.events import CancelToken, drain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes as Linux shows them")

SLEEPER = [sys.executable, "-c", "import time; time.sleep(120)"]
PARENTS = {
    "a command": "from lowmem.background import run_child; from lowmem.events import CancelToken\n"
    f"for _ in run_child({SLEEPER!r}, '', CancelToken()): pass",
    "a derivation": "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; from lowmem.background import end_with_parent;'\n"
    "    'end_with_parent(); time.sleep(120)'])\n"
    "child.wait()",
    "a job": "from lowmem.machine.child import Child; import time\nchild = Child('lowmem.jobs'); time.sleep(120)",
}


@pytest.mark.parametrize("kind", PARENTS)
def test_no_child_outlives_a_killed_parent(kind: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENTS[kind]])
    try:
        children = _settled(psutil.Process(parent.pid))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    assert gone
    assert not alive


def _settled(parent: psutil.Process) -> list[psutil.Process]:
    """The children of `parent`, once the last of them sleeps or waits."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with suppress(psutil.Error):
            children = parent.children(recursive=True)
            if children and all(child.status() == psutil.STATUS_SLEEPING for child in children):
                time.sleep(1.5)
                return parent.children(recursive=True)
        time.sleep(0.1)
    raise AssertionError("no child began")


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_the_status_is_the_commands(code: str, status: int, tmp_path: Path) -> None:
    assert drain(run_child([sys.executable, "-c", code], "", CancelToken(), cwd=tmp_path))[0] == status
