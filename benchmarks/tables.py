"""The tables of BENCHMARKS.md, and the two of the README, from the files in `results/`.

python -m benchmarks.tables            write them
python -m benchmarks.tables --check    fail where one is not what `results/` says, or its run is missing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import budgets, memory, offload, promise, quantize
from benchmarks.common import ROOT, saved, table

Row = dict[str, Any]
HEAD = """# Benchmarks

Each table is printed by the one command above it, which also stores it in `benchmarks/results/`;
`python -m benchmarks.tables` puts them in here. Peers and lowmem take turns within one run, ratios are taken within a
round, and figures are medians of several rounds.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A results file and how it is presented."""

    name: str
    title: str
    command: str
    show: Callable[[Row], Row] = dict


SECTIONS = (
    Section("promise", "Peak memory: predicted and measured", "benchmarks.promise", promise.shown),
    Section("memory", "Peak memory of generating, over models and contexts", "benchmarks.memory", memory.shown),
    Section("budgets", "Random budgets: the most memory that was held", "benchmarks.budgets --seed 11", budgets.shown),
    Section("speed", "Speed, against transformers", "benchmarks.speed"),
    Section("export", "Exported graphs, against llama.cpp and onnxruntime-genai", "benchmarks.export"),
    Section("app", "The page", "benchmarks.app"),
    Section("first_token", "From a bare machine to the first token", "benchmarks.first_token"),
    Section("offload", "Offloading", "benchmarks.offload", offload.shown),
    Section("quantize", "Quantization of the demo model", "benchmarks.quantize", quantize.shown),
    Section("quantize_7b", "Quantization of a 7B model", "benchmarks.quantize_7b"),
    Section("crossload", "Checkpoints loaded by gptqmodel", "benchmarks.crossload"),
    Section("longctx_stream", "Unbounded generation", "benchmarks.longctx stream"),
    Section("longctx_speed", "Speed with a sliding window", "benchmarks.longctx speed"),
    Section("longctx_kv", "Quantized KV cache", "benchmarks.longctx kv"),
    Section("longctx_quality", "Quality of cache strategies", "benchmarks.longctx quality"),
    Section("longctx_hidden", "Hidden states by windows", "benchmarks.longctx hidden"),
)
README_BEGIN, README_END = "<!-- promise -->", "<!-- /promise -->"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a file is out of date")
    check = parser.parse_args().check
    files = {"BENCHMARKS.md": benchmarks(), "README.md": readme()}
    stale = [name for name, text in files.items() if (ROOT.parent / name).read_text(encoding="utf-8") != text]
    if check:
        for name in stale:
            print(f"{name} is not what benchmarks/results says: python -m benchmarks.tables", file=sys.stderr)
        return bool(stale)
    for name in stale:
        (ROOT.parent / name).write_text(files[name], encoding="utf-8")
    return 0


def benchmarks() -> str:
    return "\n".join([HEAD, *(_section(one) for one in SECTIONS)])


def readme() -> str:
    """The README with the table of the promise as it was last measured."""
    text = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    head, begin, rest = text.partition(README_BEGIN)
    _, end, tail = rest.partition(README_END)
    if not (begin and end):
        raise SystemExit(f"README.md lacks {README_BEGIN} ... {README_END}.")
    rows = [promise.shown(row) for row in _run("promise")["rows"]]
    return f"{head}{begin}\n{table(rows)}\n{end}{tail}"


def _section(section: Section) -> str:
    run = _run(section.name)
    packages = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    parts = [f"## {section.title}", f"    python -m {section.command}", f"{run['machine']} · {packages}"]
    return "\n\n".join([*parts, table([section.show(row) for row in run["rows"]]), *run["notes"]]) + "\n"


def _run(name: str) -> dict[str, Any]:
    run = saved(name)
    if not run["rows"]:
        command = next(section.command for section in SECTIONS if section.name == name)
        raise SystemExit(f"benchmarks/results/{name}.json is missing: python -m {command}")
    return run


if __name__ == "__main__":
    raise SystemExit(main())
