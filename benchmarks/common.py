"""What the benchmarks share: the demo model, fresh processes, rounds, result files."""

from __future__ import annotations

import json
import pydoc_data.topics
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lowmem.events import drain
from lowmem.machine.hardware import probe
from lowmem.models.fetch import fetch
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session
from tests import memlimit

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

SEVEN: dict[str, Any] = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocab": 49152}
"""The shape of a model of 7B, with a vocabulary that holds the demo model's."""


def demo_folder() -> Path:
    """The demo model's folder, fetched if need be."""
    return drain(fetch("demo"))


def demo_session(goal: Goal) -> Session:
    """A session with the demo model loaded, even if it is over the budget."""
    session = Session()
    list(session.load(session.plan_for("demo", goal), force=True))
    return session


def lowmem(*arguments: str | int | Path) -> dict[str, Any]:
    """Run `python -m lowmem ... --json` in a child process; returns the receipt."""
    command = lowmem_command(*arguments)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ... ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def lowmem_command(*arguments: str | int | Path) -> list[str]:
    return [sys.executable, "-m", "lowmem", *map(str, arguments), "--json"]


def in_cgroup(name: str, limit: int, command: Sequence[str]) -> tuple[dict[str, Any], memlimit.Result]:
    """Run `command` in a memory cgroup of `limit` bytes, which needs root; the JSON in its last line of output."""
    done = memlimit.run(limit, command, cwd=ROOT.parent)
    if done.rc:
        raise SystemExit(f"{name} ended with {done.rc}, {done.oom_killed} killed for memory:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), done


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def interleaved(engines: Mapping[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """Results of `runs` rounds in which the engines take turns, so that all see the same machine, after one to warm up."""
    rounds = [{name: run() for name, run in engines.items()} for _ in range(runs + 1)]
    return {name: [one[name] for one in rounds[1:]] for name in engines}


def english(characters: int) -> str:
    """Running English text of the standard library's manual, always the same."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return text[:characters]


def text_of(folder: Path, tokens: int) -> str:
    """English text that is `tokens` tokens long for the tokenizer in `folder`, within one or two."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(english(8 * tokens + 1000), add_special_tokens=False).ids
    return tokenizer.decode(ids[:tokens], skip_special_tokens=False)


def save(name: str, rows: list[dict[str, Any]], notes: Sequence[str] = ()) -> None:
    """Write `results/NAME.json` with the machine it was measured on."""
    from importlib.metadata import version

    RESULTS.mkdir(exist_ok=True)
    packages = {package: version(package) for package in ("torch", "transformers", "gradio")}
    content = {"machine": probe().line(), "packages": packages, "notes": list(notes), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def saved(name: str) -> dict[str, Any]:
    """What `save` wrote; no rows and no notes where it has not run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": [], "notes": []}


def merged(name: str, key: str, rows: Sequence[dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """`rows` among those of earlier runs, which they replace where `key` is equal; `order` lists the keys."""
    known = {row[key]: row for row in [*saved(name)["rows"], *rows]}
    return [known[one] for one in order if one in known]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as a Markdown table."""
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)
