"""Long context in figures: an unbounded stream, its speed, quantized keys and values against transformers' own, hidden states.

    python -m benchmarks.longctx stream [--tokens 64000] [--stepwise 12000]
                                                           perplexity, time and memory along a stream
    python -m benchmarks.longctx speed                     a token with window, with recomputation, with all in the cache
    python -m benchmarks.longctx kv [--backend quanto]     against QuantizedCache (optimum-quanto or hqq) at 4,000 tokens
    python -m benchmarks.longctx quality                   perplexity through every cache
    python -m benchmarks.longctx hidden [--tokens 100000]  peak against a text of 10,000; throughput against transformers

The demo model, greedy or teacher-forced. Every command writes its figures into results/longctx_<command>.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import demo_folder, demo_session, save, table
from lowmem.datasets.texts import calibration_text, evaluation_text
from lowmem.events import CancelToken, Step, until_receipt
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.longctx.hidden import hidden_states
from lowmem.longctx.reading import Reader
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.memory_limits import process_bytes
from lowmem.models.cache_argument import cache_argument
from lowmem.planning.cache import BLOCK as PACKED_BLOCK
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session

WINDOW, SINKS, BLOCK = 1024, 4, 4000
CONTEXT, TIMED = 4000, 130
SEEN, STRIDE = 512, 384
"""Window and stride of hidden states."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--stepwise", type=int, default=0)
    parser.add_argument("--precision", default="", help="int8, and fp32 for quality")
    parser.add_argument("--backend", default="quanto", choices=("quanto", "hqq"))
    args = parser.parse_args()
    # In int8, how a text is cut into passes alone moves perplexity by half a per cent, more than the bits of a cache do.
    args.precision = args.precision or ("fp32" if args.what == "quality" else "int8")
    rows, notes = COMMANDS[args.what](args)
    print(table(rows))
    for note in notes:
        print(note)
    save(f"longctx_{args.what}", rows, notes)


def loaded(precision: str) -> Any:
    return resident(precision)._resident()[0]


def resident(precision: str) -> Session:
    return demo_session(Goal(precision=precision, backend="torch"))


def token_ids(tokenizer: Any) -> list[int]:
    """The evaluation text."""
    return tokenizer(evaluation_text().text, add_special_tokens=False)["input_ids"]


def repeated(tokenizer: Any, tokens: int) -> list[int]:
    """Text that comes round so that the last block of 4,000 tokens is the one after the first window."""
    period = (tokens - BLOCK - WINDOW) // max(1, round((tokens - BLOCK - WINDOW) / 15_000))
    ids = token_ids(tokenizer)[:period]
    return [ids[place % len(ids)] for place in range(tokens + TIMED + 1)]


def stream(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The text is given, so that its perplexity is known; one token at a time, as in generation.

    With `--stepwise N` only the first N tokens and the last 4,000 go one by one, the others in passes of 128.
    """
    tokens = args.tokens or 64_000
    stepwise = args.stepwise or tokens
    model = loaded(args.precision)
    ids = repeated(model.tokenizer, tokens)
    reader = Reader(model.model, ids, GenerateOptions(window=WINDOW, sinks=SINKS))
    # Made before the first measurement: lists would grow beside the stream, and split the heap.
    nll, times = torch.zeros(2, tokens, dtype=torch.float64)
    rows = []
    for start in range(0, tokens, BLOCK):
        if start < stepwise or start == tokens - BLOCK:
            for number in range(start, start + BLOCK):
                started = time.perf_counter()
                nll[number] = float(reader._pass(1)[0])
                times[number] = time.perf_counter() - started
        else:
            for part in reader.read(start + BLOCK):
                nll[reader.at - len(part) : reader.at] = part
        rows.append(_row(nll, times, start))
        print(rows[-1], flush=True)
    first, last = nll[WINDOW : WINDOW + BLOCK], nll[tokens - BLOCK :]
    notes = [
        f"perplexity {_perplexity(first):.3f} of the {BLOCK:,} tokens after the first {WINDOW:,}, "
        f"{_perplexity(last):.3f} of the last {BLOCK:,}, the same text",
        f"RSS grew by {rows[-1]['RSS MB'] / rows[0]['RSS MB'] - 1:+.2%} after the first {BLOCK:,}, "
        f"by {rows[stepwise // BLOCK - 1]['RSS MB'] / rows[0]['RSS MB'] - 1:+.2%} up to {stepwise:,}, "
        "before which tokens went one by one; then in passes of 128, the last block one by one again",
        f"time for a token, last block against first: {rows[-1]['ms a token'] / rows[0]['ms a token'] - 1:+.1%}, and in "
        "turns with a stream that has read 4,000 tokens, so that both see the same machine: "
        f"{_later_than_early(model, reader, ids) - 1:+.1%}",
        f"without sinks: perplexity {_without_sinks(model, ids):.1f} of the same {BLOCK:,} tokens after the first {WINDOW:,}",
    ]
    return [rows[0], *rows[3::4]], notes


def _row(nll: Tensor, times: Tensor, start: int) -> dict[str, Any]:
    milliseconds = 1000 * float(times[start : start + BLOCK].median())
    return {
        "tokens": start + BLOCK,
        "ms a token": round(milliseconds, 2) or "",
        "perplexity": round(_perplexity(nll[start : start + BLOCK]), 3),
        "RSS MB": round(process_bytes() / 1e6, 1),
    }


def _later_than_early(model: Any, late: Reader, ids: Sequence[int]) -> float:
    """Time for a token at the end of a stream over that near its beginning; in turns, so that both see the same machine."""
    early = Reader(model.model, ids[: BLOCK + TIMED + 1], late.options)
    list(early.read(BLOCK))
    times = [(late.seconds_per_token(5), early.seconds_per_token(5)) for _ in range(TIMED // 5)]
    return median(one for one, _ in times) / median(other for _, other in times)


def _without_sinks(model: Any, ids: Sequence[int]) -> float:
    reader = Reader(model.model, ids[: WINDOW + BLOCK + 1], GenerateOptions(window=WINDOW, sinks=0))
    return _perplexity(torch.cat(list(reader.read(WINDOW + BLOCK)))[WINDOW:])


def _perplexity(nll: Tensor) -> float:
    return math.exp(float(nll.double().mean()))


def quality(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Perplexity of a text through every cache; a pass has as many tokens as a block of the packed ones."""
    model, tokens = loaded(args.precision), args.tokens or 5000
    ids = token_ids(model.tokenizer)[: tokens + 1]
    windowed = {"window": WINDOW, "sinks": SINKS}
    caches: dict[str, dict[str, Any]] = {
        "full cache": {},
        **{f"full cache in {bits} bits": {"cache_type": f"int{bits}"} for bits in (8, 4, 2)},
        "window 1024 + 4 sinks": windowed,
        **{f"window 1024 + 4 sinks in {bits} bits": {**windowed, "cache_type": f"int{bits}"} for bits in (8, 4, 2)},
        "window 1024 without sinks": {"window": WINDOW, "sinks": 0},
    }
    rows, against = [], 0.0
    for name, fields in caches.items():
        reader = Reader(model.model, ids, GenerateOptions(**fields))
        reader._chunk = PACKED_BLOCK
        found = _perplexity(torch.cat(list(reader.read(len(ids) - 1))))
        against = found if "bits" not in name else against
        change = f"{found / against - 1:+.2%}" if "bits" in name else ""
        rows.append(
            {"cache": name, "perplexity": round(found, 3), "for the bits": change, "bytes": reader.cache_bytes()}
        )
        print(rows[-1], flush=True)
    return rows, [f"{len(ids) - 1:,} tokens of the manual's tail, weights in {args.precision}"]


def speed(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Interleaved in one process, after 2,000 tokens of context."""
    model = loaded(args.precision)
    ids = token_ids(model.tokenizer)[:2600]
    caches = {
        "full cache": GenerateOptions(),
        "window 1024 + 4 sinks": GenerateOptions(window=WINDOW, sinks=SINKS),
        "window 1024 recomputed": GenerateOptions(window=WINDOW, sinks=0, use_cache=False),
        "full cache, 4 bits": GenerateOptions(cache_type="int4"),
        "window 1024 + 4 sinks, 4 bits": GenerateOptions(window=WINDOW, sinks=SINKS, cache_type="int4"),
    }
    readers = {}
    for name, options in caches.items():
        readers[name] = Reader(model.model, ids, options)
        if options.use_cache:
            list(readers[name].read(2000))
        else:
            readers[name].at = 2000
    times: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(6):
        for name, reader in readers.items():
            times[name].append(reader.seconds_per_token(2 if name.endswith("recomputed") else 8))
    rows = [{"cache": name, "ms a token": round(1000 * median(found), 2)} for name, found in times.items()]
    medians = {name: 1000 * median(found) for name, found in times.items()}
    notes = [
        f"recomputation takes {medians['window 1024 recomputed'] / medians['window 1024 + 4 sinks']:.1f} times as long as the window",
        f"the window takes {medians['window 1024 + 4 sinks'] / medians['full cache']:.2f} of the full cache at 2,000 tokens",
    ]
    return rows, notes


def kv(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """fp32 weights on both sides, the same model object; 130 tokens after 4,000, so that every cache stores a block."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
    from transformers.cache_utils import QuantizedCache

    folder = demo_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = token_ids(AutoTokenizer.from_pretrained(folder))
    axes = {"axis_key": 0, "axis_value": 0} if args.backend == "quanto" else {"axis_key": 1, "axis_value": 1}
    quantized = f"transformers QuantizedCache ({args.backend})"
    theirs = {
        quantized: QuantizedCache(backend=args.backend, config=model.config, nbits=4, **axes),
        "transformers DynamicCache": DynamicCache(config=model.config),
    }
    ours = {"lowmem 4 bits": GenerateOptions(cache_type="int4"), "lowmem full": GenerateOptions()}
    text, times, stored = torch.tensor([ids]), dict[str, list[float]](), 0
    with torch.inference_mode():
        for name, cache in theirs.items():
            inputs = {cache_argument(model): cache, "use_cache": True}
            model(input_ids=text[:, :CONTEXT], logits_to_keep=1, **inputs)
            times[name] = []
            for place in range(CONTEXT, CONTEXT + TIMED):
                started = time.perf_counter()
                model(input_ids=text[:, place : place + 1], **inputs)
                times[name].append(time.perf_counter() - started)
        for name, options in ours.items():
            times[name], held = _timed_after(model, ids, options)
            stored = stored or held
        fast = "lowmem 4 bits, weights in int8"
        times[fast], _ = _timed_after(loaded("int8").model, ids, ours["lowmem 4 bits"])
    rows = [
        {"cache": name, "ms a token, mean": round(1000 * mean(found), 1), "median": round(1000 * median(found), 1)}
        for name, found in times.items()
    ]
    half = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim * 2 * CONTEXT
    notes = [
        f"with the same weights {mean(times[quantized]) / mean(times['lowmem 4 bits']):.1f} times as fast as QuantizedCache "
        f"({args.backend}), with int8 weights {mean(times[quantized]) / mean(times[fast]):.1f} times",
        "over a full cache, QuantizedCache takes "
        f"{1000 * (mean(times[quantized]) - mean(times['transformers DynamicCache'])):.1f} ms more, ours "
        f"{1000 * (mean(times['lowmem 4 bits']) - mean(times['lowmem full'])):.1f} ms",
        f"{stored:,} bytes, {stored / half:.3f} of fp16's {half:,}",
    ]
    return rows, notes


def _timed_after(model: Any, ids: Sequence[int], options: GenerateOptions) -> tuple[list[float], int]:
    """Seconds of each of 130 tokens after 4,000, and the bytes of the cache before them."""
    reader = Reader(model, ids[: CONTEXT + TIMED + 1], options)
    list(reader.read(CONTEXT))
    held = reader.cache_bytes()
    return [reader.seconds_per_token(1) for _ in range(TIMED)], held


def hidden(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The action as the page and the command line run it, each length in a child process."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in (10_000, args.tokens or 100_000):
            arguments = {"tokens": tokens, "precision": args.precision, "out": str(Path(folder) / "states.npy")}
            for event in run_isolated("benchmarks.longctx:hidden_job", arguments):
                if isinstance(event, Finished):
                    rows.append({"tokens": tokens, **event.value})
            print(rows[-1], flush=True)
    notes = [f"peak of the longer text: {rows[1]['peak MB'] / rows[0]['peak MB']:.3f} of the shorter one's"]
    ours, plain, batched = _throughput(args.precision)
    notes.append(
        f"throughput {ours:,.0f} tokens/s; the same windows through plain transformers {plain:,.0f} one by one, "
        f"{batched:,.0f} four at a time: {ours / plain:.2f} and {ours / batched:.2f}"
    )
    return rows, notes


def hidden_job(tokens: int, precision: str, out: str) -> Generator[Step, None, dict[str, Any]]:
    session, text = resident(precision), 10 * (calibration_text().text + evaluation_text().text)
    receipt = yield from until_receipt(actions.hidden_states(session, text, SEEN, STRIDE, Path(out), tokens=tokens))
    predicted, measured = receipt.predicted["ram"], receipt.measured["ram"]
    return {
        "predicted MB": round(predicted / 1e6, 1),
        "peak MB": round(measured / 1e6, 1),
        "error": f"{predicted / measured - 1:+.1%}",
        "tokens/s": round(receipt.prefill_tps),
    }


def _throughput(precision: str) -> tuple[float, float, float]:
    """Interleaved: the same tokens by our windows into a file, and the same windows through the model, alone and by fours."""
    model = loaded(precision)
    ids = token_ids(model.tokenizer)[: SEEN + 7 * STRIDE]
    windows = torch.tensor(ids).unfold(0, SEEN, STRIDE)
    times: tuple[list[float], ...] = ([], [], [])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for _ in range(3):
            started = time.perf_counter()
            list(hidden_states(model.model, [ids], SEEN, STRIDE, Path(folder) / "states.npy", cancel=CancelToken()))
            times[0].append(time.perf_counter() - started)
            for size, found in ((1, times[1]), (4, times[2])):
                started = time.perf_counter()
                for part in windows.split(size):
                    model.model.base_model(input_ids=part, use_cache=False)
                found.append(time.perf_counter() - started)
    ours, plain, batched = (len(ids) / median(found) for found in times)
    return ours, plain, batched


COMMANDS = {"stream": stream, "speed": speed, "kv": kv, "quality": quality, "hidden": hidden}

if __name__ == "__main__":
    main()
