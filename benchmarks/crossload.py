"""Do others read what we write? gptqmodel, in an environment of its own, computes the logits that our codes stand for.

    python -m benchmarks.crossload ENVIRONMENT FOLDER ...

ENVIRONMENT is made when there is none (gptqmodel and torch, about 1 GB); each FOLDER is what
`python -m lowmem quantize demo FOLDER` made by GPTQ, RTN, HQQ or AWQ. 256 tokens of the manual's tail, in fp32 where
gptqmodel can.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, demo_folder, save, table
from benchmarks.dense import dense, original
from lowmem.datasets.texts import evaluation_text
from lowmem.models.source import read_spec

REQUIREMENTS = ("torch>=2.8,<2.14", "gptqmodel")
TOKENS = 256
TOLERANCE, TOLERANCE_AWQ = 1e-2, 0.5
"""Logits have a standard deviation of about 3. gptqmodel's layer for AWQ multiplies in half precision whatever it is given."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("environment", type=Path, help="a virtual environment, made when it is not there")
    parser.add_argument("folders", type=Path, nargs="+", help="quantized from the demo model")
    args = parser.parse_args()
    python = environment(args.environment)
    demo = demo_folder()
    rows = [compared(python, demo, folder.absolute()) for folder in args.folders]
    print(table(rows))
    save("crossload", rows)
    for row in rows:
        tolerance = TOLERANCE_AWQ if "awq" in row["gptqmodel's layer"].lower() else TOLERANCE
        if row["largest difference"] > tolerance:
            raise SystemExit(f"Logits of {row['checkpoint']} differ by more than {tolerance}.")


def environment(folder: Path) -> Path:
    """The Python of a virtual environment with gptqmodel."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def compared(python: Path, demo: Path, folder: Path) -> dict[str, Any]:
    ids = tokens(demo)
    theirs, kernel = gptqmodel_logits(python, folder, ids)
    ours, full = logits(dense(demo, folder), ids), logits(original(demo), ids)
    stored = read_spec(str(folder)).stored
    return {
        "checkpoint": stored.label if stored else "",
        "layout": stored.layout if stored else "",
        "gptqmodel's layer": kernel,
        "largest difference": float(f"{np.abs(theirs - ours).max():.2e}"),
        "same first choice": f"{(theirs.argmax(-1) == ours.argmax(-1)).mean():.1%}",
        "largest difference to the original": round(float(np.abs(full - ours).max()), 2),
    }


def tokens(demo: Path) -> Any:
    from transformers import AutoTokenizer

    ids: Sequence[int] = AutoTokenizer.from_pretrained(demo)(evaluation_text().text[: 16 * TOKENS])["input_ids"]
    return np.array(ids[:TOKENS], dtype=np.int64)


@torch.inference_mode()
def logits(model: Any, ids: Any) -> Any:
    return model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def gptqmodel_logits(python: Path, folder: Path, ids: Any) -> tuple[Any, str]:
    """Logits fp32 [tokens, vocab], and the name of the class of its quantized layers."""
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch) / "ids.npy", Path(scratch) / "logits.npy"
        np.save(given, ids)
        command = [python, ROOT / "gptqmodel_logits.py", folder, given, found]
        # Started elsewhere and without PYTHONPATH, it sees nothing of this project.
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=scratch, env=ENVIRONMENT)
        if done.returncode:
            raise SystemExit(f"gptqmodel ended with {done.returncode} on {folder}:\n{done.stderr[-3000:]}")
        return np.load(found), done.stdout.splitlines()[-1].strip()


ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
