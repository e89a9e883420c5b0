"""Exported graphs against PyTorch, llama.cpp and onnxruntime-genai: prefill and decode, interleaved, medians; memory; quality.

    python -m benchmarks.export --write                       the graphs, once
    python -m benchmarks.export [ENGINE ...] [--runs 5] [--peers PYTHON] [--gguf FILE] [--genai FOLDER]

The demo model, a prompt of 512 tokens, 128 new ones, greedy. Every engine is a child process that waits for its turn;
a round asks each of them once. Engines are the keys of `ENGINES`, all when none is named; those that run later join
the rows of earlier runs, and their ratios are to the llama.cpp of their own run. `PYTHON` is the interpreter of an environment with
llama-cpp-python and onnxruntime-genai (a peer that is absent is left out); FOLDER is what
`python -m onnxruntime_genai.models.builder -i DEMO -o FOLDER -p int4 -e cpu -c CACHE --extra_options int4_accuracy_level=4` wrote.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import demo_folder, interleaved, merged, save, table, text_of
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import read_manifest
from lowmem.settings import settings
from lowmem.units import format_bytes

PROMPT_TOKENS, NEW_TOKENS, THREADS = 512, 128, 2

OURS = """
import resource, sys, time
import onnxruntime
def held(): return int(open("/proc/self/statm").read().split()[1]) * 4096
import torch, transformers
from pathlib import Path
from lowmem.events import CancelToken
from lowmem.runtime.onnx.model import OnnxModel
from lowmem.generate.decoding import decode, Tokens
from lowmem.generate.options import GenerateOptions
# What every session of the process shares is not this one's: configuration classes, torch's first operation.
transformers.AutoConfig.from_pretrained(sys.argv[1]); transformers.GenerationConfig.from_pretrained(sys.argv[1])
torch.zeros(1, 50_000).argmax()
start = held()
model = OnnxModel(Path(sys.argv[1]), threads=2)
options = GenerateOptions(greedy=True, max_new_tokens=NEW + 1, prefill_chunk=512)
def run(ids):
    first = last = 0.0
    begun = time.perf_counter()
    for event in decode(model, [ids], options, eos_ids=frozenset(), cancel=CancelToken()):
        if isinstance(event, Tokens):
            last = time.perf_counter(); first = first or last
    return first - begun, last - first
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024 - start
"""

TORCH = """
import sys, time, torch, lowmem
from lowmem.events import CancelToken
from lowmem.generate.decoding import decode, Tokens
session = lowmem.Session()
hardware = session.hardware()
goal = lowmem.Goal(context=1024, precision=sys.argv[1], backend="torch")
list(session.load(lowmem.plan(lowmem.read_spec("demo"), hardware, lowmem.MemoryBudget.detect(hardware), goal)))
model = session._resident()[0].model
options = lowmem.GenerateOptions(greedy=True, max_new_tokens=NEW + 1, prefill_chunk=512)
def run(ids):
    first = last = 0.0
    begun = time.perf_counter()
    for event in decode(model, [ids], options, eos_ids=frozenset(), cancel=CancelToken()):
        if isinstance(event, Tokens):
            last = time.perf_counter(); first = first or last
    return first - begun, last - first
def peak(): return 0
"""

TRANSFORMERS = """
import sys, time, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
def timed(ids, count):
    begun = time.perf_counter()
    with torch.inference_mode():
        model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    return time.perf_counter() - begun
def run(ids):
    first = timed(ids, 1)
    return first, timed(ids, NEW + 1) - first
def peak(): return 0
"""

LLAMA = """
import sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
def run(ids):
    model.reset()
    begun = time.perf_counter()
    model.eval(ids)
    token = model.sample(temp=0)
    first = time.perf_counter()
    for _ in range(NEW):
        model.eval([token]); token = model.sample(temp=0)
    return first - begun, time.perf_counter() - first
def peak(): return 0
"""

GENAI = """
import sys, time
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
def run(ids):
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NEW + 1, min_length=len(ids) + NEW + 1, do_sample=False)
    generator = og.Generator(model, params)
    begun = time.perf_counter()
    generator.append_tokens(ids); generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(NEW):
        generator.generate_next_token()
    return first - begun, time.perf_counter() - first
def peak(): return 0
"""

LOOP = """
import json
ids = json.loads(sys.stdin.readline())
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps([*run(ids), peak()]), flush=True)
"""


class Engine:
    """A process that reads the prompt once and then answers every line with [prefill seconds, decode seconds, peak]."""

    def __init__(self, python: str, code: str, argument: str, ids: list[int]) -> None:
        program = f"NEW = {NEW_TOKENS}\n{code}{LOOP}"
        self._process = subprocess.Popen(
            [python, "-c", program, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._say(json.dumps(ids))

    def ready(self) -> bool:
        return self._hear() == "ready"

    def run(self) -> list[float]:
        self._say("go")
        return json.loads(self._hear())

    def end(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def _say(self, text: str) -> None:
        try:
            if self._process.stdin:
                self._process.stdin.write(text + "\n")
                self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def _hear(self) -> str:
        """The next line that is not chatter of a library."""
        for line in self._process.stdout or ():
            if line.startswith(("ready", "[")):
                return line.strip()
        return ""


VARIANTS = {
    "int4": ExportOptions(precision="int4"),
    "int4, fast prompts": ExportOptions(precision="int4", fast_prefill="on"),
    "int8": ExportOptions(precision="int8"),
    "fp32": ExportOptions(precision="fp32"),
}

PEER = "llama.cpp Q4_1"
ENGINES = (
    "transformers fp32",
    "lowmem torch int8",
    *(f"lowmem {name}" for name in VARIANTS),
    PEER,
    "onnxruntime-genai int4",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="*", default=ENGINES)
    parser.add_argument("--write", action="store_true", help="write the graphs that are not there, measure nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", default=sys.executable, help="Python with llama-cpp-python and onnxruntime-genai")
    parser.add_argument("--gguf", default="")
    parser.add_argument("--genai", default="")
    args = parser.parse_args()
    demo = demo_folder()
    if args.write:
        _write(demo)
        return
    ids = _ids(demo)
    started = {name: _engine(name, args, demo, ids) for name in args.engines}
    engines = {name: engine for name, engine in started.items() if engine.ready()}
    measured = interleaved({name: engine.run for name, engine in engines.items()}, args.runs)
    for engine in engines.values():
        engine.end()
    rows = merged("export", "engine", [_row(name, measured) for name in measured], ENGINES)
    print(table(rows))
    setting = f"{PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, greedy, {THREADS} threads, median of {args.runs}"
    save("export", rows, [f"{setting}; ratios within rounds"])


def _engine(name: str, args: argparse.Namespace, demo: Path, ids: list[int]) -> Engine:
    variant = name.removeprefix("lowmem ")
    if variant in VARIANTS:
        return Engine(sys.executable, OURS, str(_folder(variant)), ids)
    if name == "lowmem torch int8":
        return Engine(sys.executable, TORCH, "int8", ids)
    if name == "transformers fp32":
        return Engine(sys.executable, TRANSFORMERS, str(demo), ids)
    code, argument = (LLAMA, args.gguf) if name == PEER else (GENAI, args.genai)
    return Engine(args.peers, code, argument, ids)


def _folder(variant: str) -> Path:
    return settings().home / "benchmarks" / variant.replace(", ", "-").replace(" ", "-")


def _write(demo: Path) -> None:
    for name, options in VARIANTS.items():
        if not _folder(name).exists():
            _folder(name).parent.mkdir(parents=True, exist_ok=True)
            list(export_model(ExportRequest(str(demo), _folder(name), options)))


def _ids(demo: Path) -> list[int]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(demo)(text_of(demo, PROMPT_TOKENS)).input_ids
    if len(ids) < PROMPT_TOKENS:
        raise SystemExit(f"the prompt has {len(ids)} tokens")
    return ids[:PROMPT_TOKENS]


def _row(name: str, measured: dict[str, list[list[float]]]) -> dict[str, Any]:
    figures = measured[name]
    prefill, decode = (median([figure[i] for figure in figures]) for i in (0, 1))
    variant = name.removeprefix("lowmem ")
    parity = read_manifest(_folder(variant)).parity if variant in VARIANTS else {}
    return {
        "engine": name,
        "prefill tok/s": round(PROMPT_TOKENS / prefill),
        "decode tok/s": round(NEW_TOKENS / decode, 1),
        "prefill / llama.cpp": _ratio(figures, measured.get(PEER), 0),
        "decode / llama.cpp": _ratio(figures, measured.get(PEER), 1),
        "decode / genai": _ratio(figures, measured.get("onnxruntime-genai int4"), 1),
        "peak above import": format_bytes(int(figures[-1][2])) if figures[-1][2] else "",
        "KL": round(max(parity["prefill"]["kl"], parity["decode"]["kl"]), 4) if parity else "",
        "same best token": f"{min(parity['prefill']['agreement'], parity['decode']['agreement']):.1%}"
        if parity
        else "",
    }


def _ratio(figures: Sequence[Sequence[float]], peer: Sequence[Sequence[float]] | None, which: int) -> float | str:
    """How many times as fast; within a round both saw the same machine at the same moment."""
    if not peer:
        return ""
    return round(median([theirs[which] / ours[which] for ours, theirs in zip(figures, peer, strict=True)]), 2)


if __name__ == "__main__":
    main()
