"""Offloading: how much of the disk's speed reaches the tokens, in how much memory, against accelerate and against the prediction.

    python -m benchmarks.offload [CASE ...] [--runs 3] [--models FOLDER]

Every case runs in a process and a memory cgroup of its own, which needs root; rounds of all cases follow each other, and
seconds and rates are medians, peaks the highest. Each run of a 7B measures its disk first. Those named 7b want 18 GB of disk for random
weights in the shape of a 7B model, deleted at the end unless they are in the folder that is named.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import SEVEN, demo_folder, in_cgroup, lowmem_command, merged, save, table
from lowmem.models.synthetic import write_random_gptq, write_random_model
from lowmem.units import GiB, MiB, format_bytes

PROMPT = "The history of the steam engine begins"

ON_DISK = ("--disk-blocks", "all")
DEMO = ("--precision", "fp32", "--context", 128, "--raw")
BIG = ("--context", 32, "--raw", "--measure")
PACKED, HALF = "7b-4bit", "7b-fp16"

CASES: dict[str, tuple[str, str, int, int, tuple[str | int, ...]]] = {
    "demo": ("demo fp32, resident", "demo", 1536 * MiB, 64, (*DEMO, "--ram-blocks", "")),
    "demo-disk": ("demo fp32, all on disk, cache allowed", "demo", 1536 * MiB, 64, (*DEMO, *ON_DISK)),
    "demo-accelerate": ("accelerate, same memory", "demo", 1536 * MiB, 64, (*DEMO, "--reference", "accelerate")),
    "demo-uncached": ("demo fp32, all on disk, no cache", "demo", 820 * MiB, 32, (*DEMO, *ON_DISK, "--measure")),
    "7b-4bit": ("7B 4-bit in 2 GiB", PACKED, 2 * GiB, 8, BIG),
    "7b-fp16": ("7B fp16 in 3 GiB", HALF, 3 * GiB, 4, (*BIG, "--precision", "fp32")),
    "7b-batch-1": ("7B 4-bit, all on disk, batch 1", PACKED, 3 * GiB, 8, (*BIG, *ON_DISK)),
    "7b-batch-16": ("7B 4-bit, all on disk, batch 16", PACKED, 3 * GiB, 8, (*BIG, *ON_DISK, "--batch", 16)),
}
"""Name -> what it is called, model, bytes of the cgroup, tokens, and options of `lowmem offload`."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where the 7B models are, or are left")
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        raise SystemExit(f"There is no case {unknown[0]}; there are {', '.join(CASES)}.")
    demo = demo_folder()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.cases}
        for name in args.cases * args.runs:
            what, model, limit, tokens, flags = CASES[name]
            if model != "demo":
                model = str(written(args.models or Path(scratch), model, demo))
            found[name].append(row(what, model, limit, tokens, *flags))
    rows = [summary(runs) for runs in found.values()]
    print(table([shown(one) for one in rows]))
    notes = [f"median of {args.runs}; a prediction goes by the disk as it was right before the run"]
    save("offload", merged("offload", "case", rows, [case[0] for case in CASES.values()]), notes)


def written(folder: Path, name: str, demo: Path) -> Path:
    """A 7B model, which is written where it is not there yet."""
    model = folder / name
    if not (model / "config.json").exists():
        write = write_random_gptq if name == PACKED else write_random_model
        write(model, **SEVEN, tokenizer_from=demo)
    return model


def row(name: str, model: str, limit: int, tokens: int, *flags: str | int) -> dict[str, Any]:
    """One run in a memory cgroup of its own."""
    command = lowmem_command("offload", model, "--prompt", PROMPT, "--max-new-tokens", tokens, *flags)
    receipt, outcome = in_cgroup(name, limit, command)
    details = receipt["details"]
    seconds = details["seconds_per_token"]
    rate = details.get("disk_bytes_per_second", 0.0)
    return {
        "case": name,
        "limit": limit,
        "placement": details["placement"],
        "seconds_per_token": seconds,
        "predicted_seconds": details.get("predicted_seconds_per_token", 0.0),
        "share_of_disk": details.get("bytes_per_token", 0) / seconds / rate if rate else 0.0,
        "disk_bytes_per_second": rate,
        "peak": receipt["measured"]["ram"],
        "predicted_peak": receipt["predicted"].get("ram", 0),
        "killed": outcome.oom_killed,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one case as one row."""
    typical = ("seconds_per_token", "predicted_seconds", "share_of_disk", "disk_bytes_per_second")
    worst = ("peak", "killed")
    return (
        runs[0]
        | {key: median([run[key] for run in runs]) for key in typical}
        | {key: max(run[key] for run in runs) for key in worst}
    )


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": row["case"],
        "blocks": row["placement"],
        "s/token": f"{row['seconds_per_token']:.3f}",
        "predicted": f"{row['predicted_seconds']:.3f}" if row["predicted_seconds"] else "",
        "of the disk": f"{row['share_of_disk']:.0%}" if row["share_of_disk"] else "",
        "peak": format_bytes(row["peak"]),
        "predicted peak": format_bytes(row["predicted_peak"]) if row["predicted_peak"] else "",
    }


if __name__ == "__main__":
    main()
