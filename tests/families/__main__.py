"""Every toy through every action, and the matrix of the results in docs/families.md.

    python -m tests.families [TYPE ...] [--actions greedy,batch] [--jobs 2] [--fresh]

Finished cells are in build/families.json: a stopped run goes on, and cells that other code has run are run again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
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

RESULTS = ROOT / "build" / "families.json"
DOCUMENT = ROOT / "docs" / "families.md"


def fingerprint() -> str:
    """Of the code that cells depend on."""
    own = [ROOT / "tests" / "families" / name for name in ("check.py", "zoo.py")]
    files = sorted((ROOT / "lowmem").rglob("*.py")) + own
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description="Fill the matrix of families.")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all types by default")
    parser.add_argument("--actions", default=",".join(matrix.ACTIONS), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at once")
    parser.add_argument("--fresh", action="store_true", help="run finished cells again")
    arguments = parser.parse_args()
    types, actions = arguments.types or list(zoo.TYPES), arguments.actions.split(",")
    if unknown := sorted({*types} - {*zoo.TYPES}) + sorted({*actions} - {*matrix.ACTIONS}):
        parser.error(f"no such type or action: {', '.join(unknown)}")

    code = fingerprint()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def fill(kind: str) -> None:
        row = results.get(kind, {})
        todo = [name for name in actions if arguments.fresh or row.get(name, {}).get("code") != code]
        started = time.perf_counter()
        found = runner.run(kind, todo) if todo else {}
        results[kind] = {**row, **{name: {"cell": cell, "code": code} for name, cell in found.items()}}
        RESULTS.parent.mkdir(exist_ok=True)
        temporary = RESULTS.with_suffix(f".{kind}")
        temporary.write_text(json.dumps(results, indent=1, sort_keys=True))
        temporary.replace(RESULTS)
        good = sum(cell == "ok" for cell in found.values())
        print(f"{kind}: {good} of {len(found)} ok, {time.perf_counter() - started:.0f} s", flush=True)
        if arguments.types:
            for name, cell in found.items():
                print(f"    {name}: {cell}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(fill, types))
    cells = {kind: {name: cell["cell"] for name, cell in row.items()} for kind, row in results.items()}
    cells = {kind: row for kind, row in cells.items() if kind in zoo.TYPES}
    DOCUMENT.write_text(matrix.document(cells, zoo.EXCLUDED), encoding="utf-8")
    print(matrix.summary(cells))


if __name__ == "__main__":
    main()
