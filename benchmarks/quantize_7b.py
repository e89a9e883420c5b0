"""A 7B, quantized in less memory than a quarter of it takes: random weights in the shape of Llama 2.

    python -m benchmarks.quantize_7b [rtn hqq gptq] [--layers 32] [--scratch FOLDER]

13.5 GB in fp16 become 4 bits by round to nearest and by HQQ in a memory cgroup of 3 GB, page cache included, beside
plainly reading those bytes and writing as many as come out, in the same cgroup, everything from a cold cache. GPTQ does
one block, in 4 GB, from which the time for all is extrapolated. Needs root and 19 GB of disk, of which nothing is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import demo_folder, in_cgroup, lowmem_command, merged, save, table
from lowmem.models.synthetic import write_random_model
from lowmem.units import GB, MB
from tests import memlimit

BLOCKS = 32
SHAPE: dict[str, Any] = {"hidden": 4096, "intermediate": 11008, "heads": 32, "dtype": "fp16"}
STREAMED, CALIBRATED = ("rtn", "hqq"), "gptq"
LIMITS = {"copy": 3 * GB, "rtn": 3 * GB, "hqq": 3 * GB, CALIBRATED: 4 * GB}
WHAT = {
    "copy": "reading and writing those bytes",
    "rtn": "round to nearest",
    "hqq": "HQQ",
    CALIBRATED: "GPTQ, one block",
}
LARGEST = 4 * GB
CHUNK = 16 * MB
GROUP = 128  # 4.16 bits a weight; with groups of 64 the layers alone take 3.5 GB


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=[*STREAMED, CALIBRATED], help="default: all three")
    parser.add_argument("--layers", type=int, default=BLOCKS, help="of the streamed model; fewer are a trial")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder on a disk with room")
    args = parser.parse_args()
    if reason := memlimit.unavailable():
        raise SystemExit(reason)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if methods := [method for method in STREAMED if method in args.methods]:
            rows += streamed(Path(scratch), methods, args.layers)
            keep(rows)
        if CALIBRATED in args.methods:
            rows.append(one_block(Path(scratch)))
            keep(rows)


def keep(rows: Sequence[dict[str, Any]]) -> None:
    """Print `rows`; those of a trial with few blocks are not saved."""
    whole = [row for row in rows if row["blocks"] == (1 if row["what"] == WHAT[CALIBRATED] else BLOCKS)]
    found = merged("quantize_7b", "what", whole, list(WHAT.values()))
    print(table(rows), *notes(rows), sep="\n", flush=True)
    if whole:
        save("quantize_7b", found, [*notes(found)])


def streamed(scratch: Path, methods: Sequence[str], layers: int) -> list[dict[str, Any]]:
    """Every method on one model, after the plain copy that they are compared with."""
    model = scratch / "model"
    spec = write_random_model(model, layers=layers, vocab=32_000, **SHAPE)
    files, found = sorted(model.glob("*.safetensors")), []
    for method in methods:
        out = scratch / method
        found.append(limited(method, files, quantize_command(model, out, method)))
        remove(out)
    # As many bytes as the largest result has; known only now.
    size = max(row["bytes"] for row in found)
    this = [sys.executable, "-c", f"from benchmarks.quantize_7b import copy; copy({str(scratch)!r}, {size})"]
    found.insert(0, limited("copy", files, this))
    return [shown(row, spec.size_on_disk, layers, found[0]["seconds"]) for row in found]


def one_block(scratch: Path) -> dict[str, Any]:
    """A model of one block, with a real tokenizer for its 64 x 512 tokens of calibration."""
    model = scratch / "block"
    write_random_model(model, layers=1, vocab=49_152, tied=True, tokenizer_from=demo_folder(), **SHAPE)
    files = sorted(model.glob("*.safetensors"))
    found = limited(CALIBRATED, files, quantize_command(model, scratch / CALIBRATED, CALIBRATED))
    return shown(found, sum(file.stat().st_size for file in files), 1, None)


def quantize_command(model: Path, out: Path, method: str) -> list[str]:
    return lowmem_command("quantize", model, out, "--method", method, "--bits", 4, "--group-size", GROUP)


def limited(what: str, files: Sequence[Path], command: list[str]) -> dict[str, Any]:
    """Run `command` in its cgroup from a cold cache; its last line of output is JSON."""
    forget(files)
    started = time.perf_counter()
    receipt, _ = in_cgroup(what, LIMITS[what], command)
    taken = time.perf_counter() - started
    # The copy is compared without the start of its interpreter, the quantizer with it.
    seconds = receipt["seconds"] if what == "copy" else taken
    return {"what": what, "seconds": seconds, "bytes": receipt["disk_bytes"], "receipt": receipt}


def shown(found: dict[str, Any], original: int, layers: int, plain_seconds: float | None) -> dict[str, Any]:
    receipt = found["receipt"]
    measured, predicted = receipt.get("measured", {}), receipt.get("predicted", {})
    return {
        "what": WHAT[found["what"]],
        "blocks": layers,
        "limit GB": LIMITS[found["what"]] / GB,
        "fp16 GB": round(original / GB, 2),
        "4 bits GB": round(found["bytes"] / GB, 2),
        "seconds": round(found["seconds"], 1),
        "times the copy": "" if plain_seconds is None else round(found["seconds"] / plain_seconds, 2),
        "predicted MB": round(predicted["ram"] / MB) if predicted else "",
        "measured MB": round(measured["ram"] / MB) if measured else "",
    }


def notes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "All weights are random. Times are from a cold cache, those of the quantizer with its start; results are left to the system to write out."
    for row in rows:
        if row["what"] in (WHAT["rtn"], WHAT["hqq"]) and row["blocks"] == BLOCKS:
            verdict = "within" if row["4 bits GB"] * GB <= LARGEST else "above"
            yield f"{row['what']}: {row['4 bits GB']} GB, {verdict} {LARGEST / GB:.1f} GB"
        if row["what"] == WHAT[CALIBRATED]:
            hours = row["seconds"] * BLOCKS / 3600
            yield f"GPTQ of all {BLOCKS} blocks, extrapolated from one with start and embeddings: at most {hours:.1f} hours"


def forget(files: Sequence[Path]) -> None:
    """Drop `files` from the page cache."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def copy(scratch: str, size: int) -> None:
    """Read the model in `scratch` from end to end and write `size` of its bytes; prints what a receipt would say."""
    started, written, buffer = time.perf_counter(), 0, memoryview(bytearray(CHUNK))
    target = Path(scratch) / "copy"
    with target.open("wb", buffering=0) as out:
        for path in sorted((Path(scratch) / "model").glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    written += out.write(buffer[: min(count, size - written)])
    seconds = time.perf_counter() - started
    target.unlink()
    print(json.dumps({"disk_bytes": written, "seconds": seconds}))


if __name__ == "__main__":
    main()
