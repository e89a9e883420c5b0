"""Our loop against transformers' own `generate`, interleaved in one process, medians.

    python -m benchmarks.speed [--runs 5]

The demo model, a prompt of 512 tokens, 64 new ones, greedy. Prefill is timed by one new
token, decode by the difference to 65.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import demo_folder, demo_session, interleaved, save, table, text_of
from lowmem.events import Receipt
from lowmem.generate.options import GenerateOptions
from lowmem.planning.goal import Goal

PROMPT_TOKENS, NEW_TOKENS = 512, 64
BASELINE = "transformers fp32"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    folder = demo_folder()
    prompt = text_of(folder, PROMPT_TOKENS)
    engines: dict[str, Callable[[], tuple[float, float]]] = {BASELINE: transformers_run(str(folder), prompt)}
    for precision in ("fp32", "bf16", "int8"):
        engines[f"lowmem {precision}"] = lowmem_run(precision, prompt)
    measured = interleaved(engines, runs)
    rows = [row(name, figures, measured[BASELINE]) for name, figures in measured.items()]
    print(table(rows))
    save("speed", rows, [f"{PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, greedy, median of {runs}"])


def row(name: str, figures: list[tuple[float, float]], baseline: list[tuple[float, float]]) -> dict[str, Any]:
    prefill, decode = (median([figure[i] for figure in figures]) for i in (0, 1))
    # Ratios within a round: both saw the same machine at the same moment.
    prefill_ratio, decode_ratio = (
        median([f[i] / b[i] for f, b in zip(figures, baseline, strict=True)]) for i in (0, 1)
    )
    return {
        "engine": name,
        "prefill tok/s": round(prefill),
        "decode tok/s": round(decode, 1),
        "prefill ratio": round(prefill_ratio, 2),
        "decode ratio": round(decode_ratio, 2),
    }


def transformers_run(folder: str, prompt: str) -> Callable[[], tuple[float, float]]:
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids

    def seconds(new_tokens: int) -> float:
        started = time.perf_counter()
        model.generate(ids, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
        return time.perf_counter() - started

    def run() -> tuple[float, float]:
        first, all_tokens = seconds(1), seconds(NEW_TOKENS + 1)
        return ids.shape[1] / first, NEW_TOKENS / (all_tokens - first)

    return run


def lowmem_run(precision: str, prompt: str) -> Callable[[], tuple[float, float]]:
    session = demo_session(Goal(context=1024, precision=precision))
    options = GenerateOptions(max_new_tokens=NEW_TOKENS + 1, greedy=True)

    def run() -> tuple[float, float]:
        *_, receipt = session.generate(prompt, options, raw=True, force=True)
        if not isinstance(receipt, Receipt) or receipt.new_tokens != NEW_TOKENS + 1:
            raise SystemExit(f"the answer ended after {receipt} tokens; choose another prompt")
        return receipt.prefill_tps, receipt.decode_tps

    return run


if __name__ == "__main__":
    main()
