"""The promise: peak memory and time predicted before an action, the budget it was given, and what was measured.

    python -m benchmarks.promise [--quick]

Every row is one command line in a child process: `python -m lowmem ACTION ... --ram BUDGET --json`. Models are the
demo model and random weights in shapes of 0.5B, 1B and 7B (the last in 4 bits); a prompt fills the context but for 32 tokens.
Speeds of answering and measuring are learned from earlier runs: what takes longer than 10 s and had none is run again.
`--quick` runs the demo model's rows and saves nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import SEVEN, demo_folder, english, lowmem, save, table, text_of
from lowmem.machine.rates import LONG_SECONDS
from lowmem.models.synthetic import write_random_gptq, write_random_model
from lowmem.units import format_bytes, format_seconds, format_time_range

NEW_TOKENS = 32
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"layers": 24, "hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 4},
    "1B": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the demo model's rows only; nothing is saved")
    quick = parser.parse_args().quick
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model, action, budget, arguments in cases(Path(scratch), quick):
            receipt = lowmem(*arguments, "--ram", budget)
            if not receipt["predicted_seconds"] and receipt["seconds"] >= LONG_SECONDS:
                receipt = lowmem(*arguments, "--ram", budget)
            predicted, measured = receipt["predicted"]["ram"], receipt["measured"]["ram"]
            row = {"action": action, "model": model, "budget": budget, "predicted": predicted, "measured": measured}
            row |= {"predicted_seconds": receipt["predicted_seconds"], "seconds": receipt["seconds"]}
            rows.append(row)
            print(table([shown(row)]).splitlines()[-1], flush=True)
            if not quick:  # a run that is ended early keeps its rows
                save("promise", rows, [largest_error(rows)])
    print("\n" + table([shown(row) for row in rows]))
    print("\n" + largest_error(rows))


def cases(scratch: Path, quick: bool) -> Iterator[tuple[str, str, str, list[str | int | Path]]]:
    """(model, action, budget, command line) of every row; models are written to `scratch` when their turn comes."""
    demo = demo_folder()
    text = scratch / "text.txt"
    text.write_text(english(40_000), encoding="utf-8")
    name = "SmolLM2-135M"
    yield name, "generate, fp32, 512 tokens", "1G", generate("demo", demo, "fp32", 512)
    yield name, "generate, int8, 512 tokens", "800M", generate("demo", demo, "int8", 512)
    yield name, "generate, bf16, 8,192 tokens", "1.2G", generate("demo", demo, "bf16", 8192)
    yield name, "stream from disk, fp32", "600M", ["offload", "demo", "--prompt", "The sky is", "--max-new-tokens", 8]
    yield name, "perplexity of a long text, fp32", "1.2G", [
        "longctx", "perplexity", "demo", "--text", text, "--window", 2048, "--precision", "fp32",
    ]  # fmt: skip
    yield name, "compare fp32, bf16 and int8", "1.3G", ["compare", "demo", "--variants", "fp32,bf16,int8"]
    yield name, "quantize, round to nearest", "520M", ["quantize", "demo", scratch / "rtn", "--method", "rtn"]
    yield name, "export, int4 graph", "1.2G", ["export", "demo", scratch / "int4", "--precision", "int4"]
    yield name, "hidden states of a long text", "900M", [
        "longctx", "hidden", "demo", "--text", text, "--window", 1024, "--out", scratch / "states.npy",
    ]  # fmt: skip
    if quick:
        return
    yield name, "quantize, GPTQ", "700M", ["quantize", "demo", scratch / "gptq", "--method", "gptq"]
    for name, shape in SHAPES.items():
        folder = scratch / name
        write_random_model(folder, **shape, vocab=49152, dtype="fp16", tokenizer_from=demo)
        for precision, budget in zip(("fp32", "bf16", "int8"), BUDGETS[name], strict=True):
            command = generate(folder, demo, precision, 2048)
            yield f"random {name}", f"generate, {precision}, 2,048 tokens", budget, command
    yield "random 1B", "stream from disk, bf16", "1500M", [
        "offload", folder, "--prompt", "The sky is", "--max-new-tokens", 4, "--precision", "bf16",
    ]  # fmt: skip
    yield "random 1B", "quantize, round to nearest", "1500M", ["quantize", folder, scratch / "rtn1", "--method", "rtn"]
    yield "random 1B", "export, int8 graph", "4G", ["export", folder, scratch / "int8", "--precision", "int8"]
    seven = scratch / "7B"
    write_random_gptq(seven, **SEVEN, tokenizer_from=demo)
    yield "random 7B, 4 bits", "stream from disk", "2200M", [
        "offload", seven, "--prompt", "The sky is", "--max-new-tokens", 4,
    ]  # fmt: skip


BUDGETS = {"0.5B": ("3G", "2G", "1500M"), "1B": ("6G", "4G", "3G")}
"""For fp32, bf16 and int8."""


def generate(model: str | Path, tokenizer: Path, precision: str, context: int) -> list[str | int | Path]:
    prompt = text_of(tokenizer, context - NEW_TOKENS - 2)
    return [
        "generate", model, "--prompt", prompt, "--raw", "--greedy", "--max-new-tokens", NEW_TOKENS,
        "--context", context, "--precision", precision,
    ]  # fmt: skip


def error(row: dict[str, Any]) -> float:
    """How far the prediction is above the measured peak, as a share of it."""
    return (row["predicted"] - row["measured"]) / row["measured"]


def largest_error(rows: list[dict[str, Any]]) -> str:
    return f"largest error {max(abs(error(row)) for row in rows):.1%}"


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "action": row["action"],
        "budget": row["budget"].replace("G", " GB").replace("M", " MB"),
        "predicted": format_bytes(row["predicted"]),
        "measured": format_bytes(row["measured"]),
        "error": f"{error(row):+.1%}",
    } | (times(row) if "seconds" in row else {})


def times(row: dict[str, Any]) -> dict[str, str]:
    predicted = row["predicted_seconds"]
    return {
        "predicted time": format_time_range(predicted) if predicted else "-",
        "time": format_seconds(row["seconds"]),
    }


if __name__ == "__main__":
    main()
