"""Peak memory of generating, predicted and measured, over models, precisions, context lengths and batches.

    python -m benchmarks.memory [--quick] [--again]

Every case is one command, `python -m lowmem generate ... --json`, in a child process. Rows are saved as they come; a run
that was ended goes on after its last row. `--again` measures all cases anew. `--quick` runs three cases of the demo model
and saves nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import demo_folder, lowmem, save, saved, table, text_of
from benchmarks.promise import NEW_TOKENS, error, largest_error
from lowmem.models.checkpoint_writer import write_shards
from lowmem.models.synthetic import write_random_model
from lowmem.units import format_bytes

DEMO, LARGE_VOCABULARY = "SmolLM2-135M", "random gemma-3-270m"
SHAPES: dict[str, dict[str, Any]] = {
    "random 0.5B": {"layers": 24, "hidden": 1024, "intermediate": 4096, "heads": 16, "kv_heads": 4},
    "random 1B": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8},
    "random 3B": {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8},
}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "dtype": "bfloat16", "num_hidden_layers": 18,
    "hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "vocab_size": 262144, "max_position_embeddings": 32768, "tie_word_embeddings": True, "sliding_window": 512,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
    "bos_token_id": 2, "eos_token_id": 1,
    "layer_types": ["sliding_attention" if (layer + 1) % 6 else "full_attention" for layer in range(18)],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One command; `precision` "rtn" is a folder that was quantized first, "graph int4" one that was exported."""

    model: str
    precision: str
    context: int
    batch: int = 1
    name: str = field(init=False)

    def __post_init__(self) -> None:
        batch = f", batch of {self.batch}" if self.batch > 1 else ""
        object.__setattr__(self, "name", f"{self.model}, {self.precision}, {self.context:,} tokens{batch}")


LONGEST_ARGUMENT = 100_000
"""Characters; Linux takes 128 KB in one argument of a command line."""

QUICK = tuple(Case(DEMO, precision, 512) for precision in ("fp32", "bf16", "int8"))
CASES = (
    *QUICK,
    *(Case(DEMO, precision, 512) for precision in ("graph int8", "graph int4", "rtn")),
    *(Case(DEMO, precision, 8192) for precision in ("fp32", "bf16", "int8")),
    Case(DEMO, "fp32", 512, 8),
    Case(DEMO, "int8", 512, 8),
    *(Case(LARGE_VOCABULARY, precision, 512) for precision in ("fp32", "int8", "rtn")),
    *(Case("random 0.5B", precision, 2048) for precision in ("fp32", "bf16", "int8")),
    Case("random 0.5B", "int8", 32_768),
    *(Case("random 1B", precision, 2048) for precision in ("fp32", "bf16", "int8")),
    *(Case("random 3B", precision, 2048) for precision in ("bf16", "int8")),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three cases of the demo model; nothing is saved")
    parser.add_argument("--again", action="store_true", help="measure cases that were measured before, too")
    args = parser.parse_args()
    rows = [] if args.quick or args.again else saved("memory")["rows"]
    done = {row["case"] for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for case in QUICK if args.quick else CASES:
            if case.name in done:
                continue
            rows.append(measured(case, Path(scratch)))
            print(table([shown(rows[-1])]).splitlines()[-1], flush=True)
            if not args.quick:
                save("memory", rows, [largest_error(rows)])
    print("\n" + table([shown(row) for row in rows]))


def measured(case: Case, scratch: Path) -> dict[str, Any]:
    receipt = lowmem("generate", *arguments(case, scratch))
    return {"case": case.name, "predicted": receipt["predicted"]["ram"], "measured": receipt["measured"]["ram"]}


def arguments(case: Case, scratch: Path) -> Iterator[str | int | Path]:
    prompt = text_of(demo_folder(), case.context - NEW_TOKENS - 2)
    yield from (model_of(case, scratch), "--raw", "--greedy", "--max-new-tokens", NEW_TOKENS, "--context", case.context)
    if case.batch > 1 or len(prompt) > LONGEST_ARGUMENT:
        prompts = scratch / "prompts.txt"
        prompts.write_text("\n".join([" ".join(prompt.split())] * case.batch), encoding="utf-8")
        yield from ("--prompts", prompts, "--batch-size", case.batch)
    else:
        yield from ("--prompt", prompt)
    if case.precision != "rtn":
        yield from ("--precision", case.precision.removeprefix("graph "))


def model_of(case: Case, scratch: Path) -> str | Path:
    """The model's name or folder; models are written to `scratch` once."""
    source: str | Path = "demo" if case.model == DEMO else written(case.model, scratch)
    out = scratch / f"{case.model} {case.precision}"
    if case.precision == "rtn" and not out.exists():
        lowmem("quantize", source, out, "--method", "rtn")
    if case.precision.startswith("graph ") and not out.exists():
        lowmem("export", source, out, "--precision", case.precision.removeprefix("graph "))
    return out if out.exists() else source


def written(model: str, scratch: Path) -> Path:
    folder = scratch / model
    if not folder.exists():
        if model == LARGE_VOCABULARY:
            write_gemma(folder)
        else:
            write_random_model(
                folder, **SHAPES[model], vocab=49152, context=32_768, dtype="fp16", tokenizer_from=demo_folder()
            )
    return folder


def write_gemma(folder: Path) -> None:
    """A checkpoint of gemma-3-270m's shape with random weights, and a tokenizer with as many entries."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GEMMA), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    draw = torch.Generator().manual_seed(0)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    tensors = (
        (name, (torch.randn(shape, generator=draw) * 0.02 if len(shape) > 1 else torch.zeros(shape)).bfloat16())
        for name, shape in shapes.items()
    )
    write_shards(folder, tensors, 2_000_000_000)
    write_tokenizer(folder, 262_144)


def write_tokenizer(folder: Path, entries: int) -> None:
    """The demo model's tokenizer, filled up to `entries` with merges of two of its tokens."""
    fields = json.loads((demo_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary, merges = fields["model"]["vocab"], fields["model"]["merges"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    for first, second in itertools.product(tokens[300:], repeat=2):
        if len(vocabulary) == entries:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    (folder / "tokenizer.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(demo_folder() / "tokenizer_config.json", folder / "tokenizer_config.json")


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "case": row["case"],
        "predicted": format_bytes(row["predicted"]),
        "measured": format_bytes(row["measured"]),
        "error": f"{error(row):+.1%}",
    }


if __name__ == "__main__":
    main()
