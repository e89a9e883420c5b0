"""Every toy through every action, and the matrix of the results in docs/families.md.

    python -m tests.families [TYPE ...] [--actions greedy,batch] [--jobs 2] [--fresh] [--keep]

Finished cells are in build/families: a stopped run goes on, and cells that other code has run are run again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    LOWMEM_HOME=str(ROOT / "build" / "home"),  # with what is measured once per machine
    OMP_NUM_THREADS="1",
    PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}",  # of the processes that the toys run in
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)
sys.path.insert(0, str(ROOT / "tests"))

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

from families import matrix, runner, zoo  # noqa: E402

RESULTS = ROOT / "build" / "families"
DOCUMENT = ROOT / "docs" / "families.md"


def fingerprint() -> str:
    """Of the code that cells depend on."""
    own = [ROOT / "tests" / "families" / name for name in ("check.py", "zoo.py")]
    files = sorted((ROOT / "lowmem").rglob("*.py")) + own
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _row(kind: str) -> dict[str, dict[str, str]]:
    """Cells of one type so far: action -> {"cell": outcome, "code": fingerprint}."""
    file = RESULTS / f"{kind}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _good(cell: str) -> bool:
    return not cell.startswith(("WRONG", "CRASH"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description="Fill the matrix of families.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all types by default")
    parser.add_argument("--actions", default=",".join(matrix.ACTIONS), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    parser.add_argument("--fresh", action="store_true", help="run finished cells again")
    parser.add_argument("--keep", action="store_true", help="keep cells that other code has run, but WRONG and CRASH")
    arguments = parser.parse_args()
    types, actions = arguments.types or list(zoo.TYPES), arguments.actions.split(",")
    if unknown := sorted({*types} - {*zoo.TYPES}) + sorted({*actions} - {*matrix.ACTIONS}):
        parser.error(f"no such type or action: {', '.join(unknown)}")

    code = fingerprint()
    RESULTS.mkdir(parents=True, exist_ok=True)

    def fill(kind: str) -> None:
        row = _row(kind)
        done = {name for name, cell in row.items() if cell["code"] == code or (arguments.keep and _good(cell["cell"]))}
        todo = [name for name in actions if arguments.fresh or name not in done]
        started = time.perf_counter()
        found = runner.run(kind, todo) if todo else {}
        row = {**_row(kind), **{name: {"cell": cell, "code": code} for name, cell in found.items()}}
        temporary = RESULTS / f"{kind}.{os.getpid()}"
        temporary.write_text(json.dumps(row, indent=1))
        temporary.replace(RESULTS / f"{kind}.json")
        good = sum(cell == "ok" for cell in found.values())
        print(f"{kind}: {good} of {len(found)} ok, {time.perf_counter() - started:.0f} s", flush=True)
        if arguments.types:
            for name, cell in found.items():
                print(f"    {name}: {cell}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(fill, types))
    rows = {kind: _row(kind) for kind in zoo.TYPES}
    cells = {kind: {name: cell["cell"] for name, cell in row.items()} for kind, row in rows.items() if row}
    DOCUMENT.write_text(matrix.document(cells, zoo.EXCLUDED), encoding="utf-8")
    print(matrix.summary(cells))


if __name__ == "__main__":
    main()
