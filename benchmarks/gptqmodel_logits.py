"""Runs in gptqmodel's environment, without lowmem: the logits of a quantized folder, computed by gptqmodel on the CPU.

    python gptqmodel_logits.py FOLDER IDS.npy LOGITS.npy

Ids are int64 [tokens], logits fp32 [tokens, vocab]. The last line names the kernel.
"""

import os
import sys
from pathlib import Path

# Where there are two cores gptqmodel gives its pool one thread and then refuses to start, since it wants two to load.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel


def main(folder: str, ids: str, out: str) -> None:
    awq = '"awq"' in (Path(folder) / "config.json").read_text()
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    # Its kernels load in half precision only; scales and all other weights are stored in it, so nothing is lost by then.
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model.eval().float()
    with torch.inference_mode():
        logits = model(torch.from_numpy(np.load(ids))[None], use_cache=False).logits[0]
    np.save(out, logits.float().numpy())
    print(type(model.model.layers[0].mlp.down_proj).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
