"""Run a command on "a machine with N bytes": in a memory cgroup (v1 or v2), page cache included.

    python -m tests.memlimit 3G python -m lowmem ...

prints as its last line what the command cost, and exits as the command did.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.units import MB, parse_bytes

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Result:
    """How the command ended; `oom_killed` counts processes that the kernel killed for memory.

    `peak_bytes` includes page cache, and is 0 on kernels that do not keep it (cgroup v2 before 5.19).
    """

    rc: int
    peak_bytes: int
    oom_killed: int
    stdout: str = ""
    stderr: str = ""


def run(limit_bytes: int, command: Sequence[str], *, capture: bool = True, **options: Any) -> Result:
    """Run `command` with at most `limit_bytes` of memory; `options` go to `subprocess.run`.

    Raises:
        OSError: no memory cgroup can be made here, see `unavailable`.
    """
    with _group(limit_bytes) as group:
        # The shell joins the group before it becomes the command, so nothing of it runs outside.
        enter = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group), *command]
        done = subprocess.run(enter, capture_output=capture, text=True, **options)
        peak, kills = _peak_and_kills(group)
    return Result(done.returncode, peak, kills, done.stdout or "", done.stderr or "")


def unavailable() -> str | None:
    """Why memory cgroups cannot be made here, or None when they can."""
    try:
        with _group(64 * MB):
            return None
    except OSError as error:
        return f"needs root and writable memory cgroups ({error})"


@contextlib.contextmanager
def _group(limit_bytes: int) -> Iterator[Path]:
    name = f"lowmem-test.{os.getpid()}.{next(_numbers)}"
    v1 = _V1.is_dir()
    group = (_V1 if v1 else _V2) / name
    if not v1:
        (_V2 / "cgroup.subtree_control").write_text("+memory")
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
        # Not every kernel accounts swap; one without swap does not need to.
        with contextlib.suppress(OSError):
            limit, value = ("memory.memsw.limit_in_bytes", limit_bytes) if v1 else ("memory.swap.max", 0)
            (group / limit).write_text(str(value))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """The kernel lets go of a group a moment after its last process has ended."""
    for _ in range(50):
        try:
            group.rmdir()
            return
        except OSError:
            time.sleep(0.02)


def _peak_and_kills(group: Path) -> tuple[int, int]:
    v1 = (group / "memory.max_usage_in_bytes").exists()
    peak_file = group / ("memory.max_usage_in_bytes" if v1 else "memory.peak")
    events = (group / ("memory.oom_control" if v1 else "memory.events")).read_text().split()
    peak = int(peak_file.read_text()) if peak_file.exists() else 0
    return peak, int(events[events.index("oom_kill") + 1]) if "oom_kill" in events else 0


def main() -> int:
    if len(sys.argv) < 3:
        print("usage: memlimit.py LIMIT COMMAND...", file=sys.stderr)
        return 2
    result = run(parse_bytes(sys.argv[1]), sys.argv[2:], capture=False)
    print(f"memlimit: rc={result.rc} peak_mb={result.peak_bytes // MB} oom_killed={result.oom_killed}")
    return result.rc if result.rc >= 0 else 128 - result.rc


if __name__ == "__main__":
    sys.exit(main())
