"""The files of an exported folder besides its graphs: tokenizer, configuration, model card, and a program that runs it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from lowmem.models.files import LocalFolder, read_object
from lowmem.models.generation_config import eos_token_ids
from lowmem.models.model_files import COMPANIONS, CONFIG
from lowmem.runtime.onnx.manifest import GRAPH, Manifest
from lowmem.units import format_bytes

log = logging.getLogger("lowmem.export")

RUN, CARD, TOKENIZER = "run.py", "README.md", "tokenizer.json"

_RUN = '''"""Runs the graph beside this file with nothing but onnxruntime, numpy and tokenizers.

    python run.py "Once upon a time" [new tokens]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

HERE = Path(__file__).parent
IN_PLACE = {in_place}


def generate(prompt: str, new_tokens: int = 32) -> str:
    """Continue `prompt` greedily."""
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    session = ort.InferenceSession(str(HERE / "model.onnx"), providers=["CPUExecutionProvider"])
    shapes = {{value.name: value.shape for value in session.get_inputs()}}
    half = any(value.type == "tensor(float16)" for value in session.get_inputs())
    ids = tokenizer.encode(prompt).ids
    new, made, capacity = ids, [], len(ids) + new_tokens
    # In place: past and present are one buffer, so nothing is copied. Otherwise the cache starts empty and grows.
    cache = {{
        name: ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, shape[1], capacity if IN_PLACE else 0, shape[3]), np.float16 if half else np.float32)
        )
        for name, shape in shapes.items()
        if name.startswith("past_key_values.")
    }}
    while True:
        past, binding = len(ids) - len(new), session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([new], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, len(ids)), np.int64))
        if "position_ids" in shapes:
            binding.bind_cpu_input("position_ids", np.arange(past, len(ids), dtype=np.int64)[None])
        binding.bind_output("logits")
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present")
            if IN_PLACE:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present)
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        if not IN_PLACE:
            cache = dict(zip(cache, outputs[1:]))
        new = [int(outputs[0].numpy()[0, -1].argmax())]
        if new[0] in {eos} or len(made) == new_tokens:
            return tokenizer.decode(made)
        made += new
        ids = ids + new


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 32
    print(generate(sys.argv[1] if len(sys.argv) > 1 else "Once upon a time", count))
'''


def write_companions(source: Path, folder: Path) -> None:
    """Copy configuration and tokenizer; without the quantization, which is part of the graph."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if not (folder / TOKENIZER).is_file():
        _write_tokenizer(source, folder / TOKENIZER)
    config = read_object(LocalFolder(source), CONFIG)
    if config.pop("quantization_config", None) is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(source: Path, path: Path) -> None:
    """Convert a tokenizer in other files to the one that `RUN` reads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(path))
    except (OSError, ValueError, ImportError, AttributeError):
        log.info("no %s can be made for %s", path.name, source.name, exc_info=True)


def write_program(folder: Path, manifest: Manifest) -> None:
    """Write run.py, for graphs that generate text."""
    if manifest.kind != "encoder":
        eos = eos_token_ids(folder)
        code = _RUN.format(in_place=manifest.kind == "fused", eos=set(eos) if eos else "()")
        (folder / RUN).write_text(code, encoding="utf-8")


def write_card(folder: Path, manifest: Manifest, sentence: str) -> None:
    """Write the model card."""
    licence = f"license: {manifest.licence}\n" if manifest.licence else ""
    files = "\n".join(f"| {name} | {format_bytes(size)} |" for name, size in manifest.files.items())
    run = ""
    if manifest.kind != "encoder":
        run = (
            "\n## Run it\n\n```\npip install onnxruntime numpy tokenizers\n"
            'python run.py "Once upon a time"\n```\n\n'
            "Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.*`, outputs `logits` and "
            "`present.*`. "
        )
        if manifest.kind == "fused":
            run += "Rows are padded on the right, and past and present may be one buffer.\n"
    text = f"""---
{licence}library_name: onnx
pipeline_tag: text-generation
tags: [lowmem, onnx, {manifest.precision}]
---

# {manifest.model}, ONNX, {manifest.precision}

Exported from {manifest.source} by lowmem. {sentence}

| File | Size |
|---|---|
{files}
{run}"""
    (folder / CARD).write_text(text, encoding="utf-8")


def graph_files(folder: Path) -> dict[str, int]:
    """Graph and weight files with their sizes; `GRAPH` comes first."""
    paths = sorted(folder.glob("*.onnx*"), key=lambda path: (path.name != GRAPH, path.name))
    return {path.name: path.stat().st_size for path in paths}
