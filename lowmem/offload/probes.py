"""Measures how fast this machine computes with stored weights, using the layers that generation runs.

A rate is in stored bytes per second, for one token of each of `rows` sequences. Import this late, since it needs torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowmem.kernels import bnb_linear, packed_linear
from lowmem.kernels.stored_layers import StoredLinear, StoredNf4, StoredPacked
from lowmem.machine.rates import rate
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.modules import set_tensor
from lowmem.models.quantization import BNB, INT8, Quantization

INPUTS, OUTPUTS = 2048, 8192
"""Shape of the measured layer, whose weights exceed the processor's caches."""

BNB_BLOCK = 64
BLOCKS = 8

CPU = torch.device("cpu")


def block_rate(device: str) -> float:
    """Tiny blocks per second, which shows the overhead of Python and torch per block."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=2
    )
    model, token = LlamaForCausalLM(config).eval().to(device), torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.inference_mode():
        # Copying the result to the CPU waits for the device.
        return rate(lambda: model(token).logits.cpu(), BLOCKS)


def dense_rate(dtype: str, rows: int = 1) -> float:
    """Rate of a matrix stored in `dtype` and computed in fp32."""
    return _rate(StoredLinear(torch.zeros(OUTPUTS, INPUTS, dtype=TORCH_DTYPES[dtype]), None), rows)


def streamed_rate(stored: Quantization, rows: int = 1) -> float:
    """Rate of the packed weights of a streamed layer, which stay in their stored form."""
    parts = _parts(stored)
    if stored.method in (INT8, BNB) and stored.bits == 8:
        return dense_rate("int8", rows)
    if stored.method == BNB:
        made: Any = bnb_linear.stored4("probe", parts, OUTPUTS, INPUTS, CPU, torch.float32)
        return _rate(StoredNf4(made.weight.data, made.weight.quant_state, INPUTS, OUTPUTS), rows, parts["weight"])
    layer = StoredPacked(stored, "probe", INPUTS, OUTPUTS)
    for part, tensor in parts.items():
        set_tensor(layer, part, tensor)
    return _rate(layer, rows, parts["qweight"])


def resident_rate(stored: Quantization, rows: int = 1) -> float:
    """Rate of the packed weights of a resident layer, in the form that the fastest kernel uses."""
    parts = _parts(stored)
    layer = packed_linear.stored_linear(stored, "probe", parts, (OUTPUTS, INPUTS), CPU, torch.float32)
    return _rate(layer, rows, parts["qweight" if "qweight" in parts else "weight"])


def _rate(layer: nn.Module, rows: int, codes: Tensor | None = None) -> float:
    x = torch.zeros(rows, INPUTS)
    counted = layer.weight if codes is None else codes
    with torch.inference_mode():
        return rate(lambda: layer(x), int(counted.nbytes))  # type: ignore[arg-type]


def _parts(stored: Quantization) -> dict[str, Tensor]:
    """The tensors of a layer as in a checkpoint; their values do not matter."""
    if stored.method == BNB and stored.bits == 4:
        return bnb_linear.packed4(torch.zeros(OUTPUTS, INPUTS), BNB_BLOCK, stored.layout, True, "float32").tensors
    if stored.method in (INT8, BNB):
        scales = {"weight_scale": torch.ones(OUTPUTS, 1)} if stored.method == INT8 else {"SCB": torch.ones(OUTPUTS)}
        return {"weight": torch.zeros(OUTPUTS, INPUTS, dtype=torch.int8)} | scales
    groups = stored.groups(INPUTS)
    parts = {
        "qweight": torch.zeros(stored.qweight_shape(OUTPUTS, INPUTS), dtype=torch.int32),
        "qzeros": torch.zeros(groups, -(-OUTPUTS * stored.bits // 32), dtype=torch.int32),
        "scales": torch.ones(groups, OUTPUTS, dtype=torch.float16),
    }
    if stored.desc_act:
        # Neighboring inputs are in different groups, as with activation order.
        parts["g_idx"] = torch.arange(INPUTS, dtype=torch.int32) % groups
    return parts
