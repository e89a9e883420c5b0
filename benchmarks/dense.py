"""The demo model with the weights that a quantized checkpoint's codes stand for, dense in fp32.

What any program that reads the checkpoint must compute, whatever kernels it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowmem.kernels.packed_linear import read
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.source import read_spec

PARTS = ("qweight", "qzeros", "scales", "g_idx")


def original(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def dense(demo: Path, quantized: Path) -> Any:
    """The model in `demo` with all weights of `quantized`, a GPTQ or AWQ folder made from it."""
    model = original(demo)
    state, stored = model.state_dict(), read_spec(str(quantized)).stored
    if stored is None:
        raise SystemExit(f"{quantized} is not quantized.")
    with Checkpoint(quantized) as checkpoint:
        for name in checkpoint.tensors:
            layer, _, part = name.rpartition(".")
            if part == "qweight":
                parts = {
                    one: checkpoint.read(f"{layer}.{one}") for one in PARTS if f"{layer}.{one}" in checkpoint.tensors
                }
                state[f"{layer}.weight"].copy_(read(stored, layer, parts).dequantize())
            elif part not in PARTS:
                state[name].copy_(checkpoint.read(name, torch.float32))
    return model
