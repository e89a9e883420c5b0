"""Predicted against measured peak memory, each case in a fresh process.

    python -m benchmarks.memory [--quick]

The demo model in fp32, bf16 and int8 at contexts of 512, 2048 and 8192 tokens, and random
weights in the shapes of 0.5B and 1B models. A case reads a prompt that fills the context but
for 32 tokens, and generates those.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import lowmem, save, table, text_of
from lowmem.events import CancelToken
from lowmem.models.fetch import fetch
from lowmem.models.synthetic import write_random_model
from lowmem.units import format_bytes

NEW_TOKENS = 32

SHAPES: dict[str, dict[str, Any]] = {
    "random 0.5B": {"layers": 24, "hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 4},
    "random 1B": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the demo model at 512 tokens only")
    quick = parser.parse_args().quick
    demo = demo_folder()
    contexts = (512,) if quick else (512, 2048, 8192)
    rows = [case("demo", "demo", demo, p, c) for p in ("fp32", "bf16", "int8") for c in contexts]
    if not quick:
        with tempfile.TemporaryDirectory() as scratch:
            for name, shape in SHAPES.items():
                folder = Path(scratch) / name.replace(" ", "-")
                write_random_model(folder, **shape, vocab=49152, dtype="fp16", tokenizer_from=demo)
                rows += [case(name, str(folder), demo, p, 2048) for p in ("fp32", "bf16", "int8")]
    print(table([shown(row) for row in rows]))
    worst = max(abs(row["error"]) for row in rows)
    print(f"\nworst error {worst:.1%}")
    if not quick:
        save("memory", rows)


def demo_folder() -> Path:
    steps = fetch("demo", CancelToken())
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def case(name: str, model: str, tokenizer: Path, precision: str, context: int) -> dict[str, Any]:
    prompt = text_of(tokenizer, context - NEW_TOKENS - 2)
    receipt = lowmem(
        "generate", model, "--prompt", prompt, "--raw", "--greedy",
        "--max-new-tokens", NEW_TOKENS, "--context", context, "--precision", precision,
    )  # fmt: skip
    predicted, measured = receipt["predicted"]["ram"], receipt["measured"]["ram"]
    return {
        "model": name,
        "precision": precision,
        "context": context,
        "predicted": predicted,
        "measured": measured,
        "error": (predicted - measured) / measured,
        "decode_tps": receipt["decode_tps"],
        "prefill_tps": receipt["prefill_tps"],
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": row["model"],
        "precision": row["precision"],
        "context": row["context"],
        "predicted": format_bytes(row["predicted"]),
        "measured": format_bytes(row["measured"]),
        "error": f"{row['error']:+.1%}",
    }


if __name__ == "__main__":
    main()
