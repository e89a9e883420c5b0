"""RAM and CPU time available to this process: the tightest of host, cgroups and `MEMORY`.

Reads Linux control groups (v1 and v2, https://docs.kernel.org/admin-guide/cgroup-v2.html);
on other systems only the host counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowmem.errors import BadInput
from lowmem.settings import settings
from lowmem.units import parse_bytes

log = logging.getLogger("lowmem.machine")

ROOT = Path("/")


@dataclass(frozen=True, slots=True)
class Ram:
    """RAM in bytes; `limit` says what set the total: "host", "cgroup" or "MEMORY".

    Free memory can be allocated without evicting a page that a program has mapped.
    """

    total_bytes: int
    free_bytes: int
    limit: str


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One memory cgroup; `used_bytes` excludes page cache that no process has mapped."""

    limit_bytes: int
    used_bytes: int


def ram(root: Path = ROOT) -> Ram:
    """RAM within the tightest limit. /proc and /sys are read below `root`."""
    host = psutil.virtual_memory()
    # The kernel counts mapped code as available, but evicting it slows every program to a crawl.
    mapped = 1024 * _table(root / "proc/meminfo").get("Mapped:", 0)
    total, free, limit = host.total, host.available - mapped, "host"
    for group in memory_groups(root):
        free = min(free, group.limit_bytes - group.used_bytes)
        if group.limit_bytes < total:
            total, limit = group.limit_bytes, "cgroup"
    stated = _stated_bytes()
    if stated and stated < total:
        total, limit = stated, "MEMORY"
        free = min(free, stated - process_bytes())
    return Ram(total, max(0, free), limit)


def process_bytes() -> int:
    """Resident set size of this process and of those that share its budget: all that one lowmem holds."""
    return psutil.Process().memory_info().rss + other_processes_bytes()


_others: list[psutil.Process] = []
_children: dict[int, psutil.Process] = {}


def share_budget_with(pids: Iterable[int]) -> None:
    """Name the processes that share this one's budget: for the page its model's worker, for a worker the page."""
    _others[:] = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]


def add_child(pid: int) -> None:
    """Let a process that this one has started share its budget."""
    with suppress(psutil.Error):  # it has ended already
        _children[pid] = psutil.Process(pid)


def remove_child(pid: int) -> None:
    _children.pop(pid, None)


def children() -> tuple[int, ...]:
    """Processes that `add_child` named."""
    return tuple(_children)


def other_processes_bytes() -> int:
    """Resident set size of the other processes that share this one's budget."""
    total = 0
    for process in (*_others, *_children.values()):
        with suppress(psutil.Error):  # it has just ended
            total += process.memory_info().rss
    return total


def memory_groups(root: Path = ROOT) -> Iterator[MemoryGroup]:
    """The memory cgroups of this process that have a limit, innermost first."""
    for folder in _folders("memory", root):
        limit = _number(folder / "memory.max")
        used = _number(folder / "memory.current")
        prefix, mapped_key = "", "file_mapped"
        if limit is None:
            limit = _number(folder / "memory.limit_in_bytes")
            used = _number(folder / "memory.usage_in_bytes")
            prefix, mapped_key = "total_", "total_mapped_file"
        if limit is None or used is None:
            continue
        stat = _table(folder / "memory.stat")
        cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        yield MemoryGroup(limit, used - max(0, cache - stat.get(mapped_key, 0)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPU quota of the cgroups in cores; None without a quota."""
    quotas = []
    for folder in _folders("cpu", root):
        v2 = (_text(folder / "cpu.max") or "").split()
        if len(v2) == 2 and v2[0].isdigit():
            quotas.append(int(v2[0]) / int(v2[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _folders(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups for a controller, innermost first, up to the mount.

    Inside a container the path may be the host's and not exist; the mount is then the
    container's own group.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        elif not controllers:
            mount = root / "sys/fs/cgroup"
        else:
            continue
        group = mount if ".." in path else mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(mount))


def _stated_bytes() -> int | None:
    stated = settings().memory
    if not stated:
        return None
    try:
        return parse_bytes(stated)
    except BadInput:
        log.warning("MEMORY=%r is not a size and is ignored", stated)
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    """A file's number; None without the file, and for "max" and -1, which mean no limit."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdigit() else None


def _table(path: Path) -> dict[str, int]:
    """A kernel file of "name number" lines."""
    rows = (line.split() for line in (_text(path) or "").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
