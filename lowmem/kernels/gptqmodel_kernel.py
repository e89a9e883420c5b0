"""gptqmodel's GPU kernels (Marlin, Exllama, Triton) for layers of GPTQ and AWQ checkpoints, where it is installed.

The package is optional and its interface changes, so a kernel is used only if its output matches that of the `PackedLinear` it
replaces.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.kernels.packing import to_gptq
from lowmem.kernels.quantized import Quantized
from lowmem.models.quantization import Quantization

log = logging.getLogger("lowmem.quant")

TOLERANCE = 0.02
"""Largest relative difference to `PackedLinear` that half precision and another order of sums explain."""


def like(
    layer: nn.Module, weight: Quantized, stored: Quantization, parts: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module | None:
    """gptqmodel's layer for the same `parts` as `layer`, None if there is none whose output matches."""
    choose = _chooser()
    if choose is None:
        return None
    try:
        kernel = _build(choose, layer, weight, stored, parts, dtype)
        return kernel if _agree(kernel, layer, weight.codes.shape[1], dtype) else None
    except Exception:
        # Whatever is wrong with an optional package, the layer runs without it.
        log.info("gptqmodel cannot run a layer of %s", stored.label, exc_info=True)
        return None


@functools.cache
def _chooser() -> Any:
    try:
        from gptqmodel.utils.importer import hf_select_quant_linear_v2
    except Exception:
        log.info("gptqmodel's kernels are not available", exc_info=True)
        return None
    return hf_select_quant_linear_v2


def _build(
    choose: Any, layer: nn.Module, weight: Quantized, stored: Quantization, parts: dict[str, Tensor], dtype: torch.dtype
) -> Any:
    device = layer.get_buffer("codes").device
    symmetric = bool((weight.zeros == 2 ** (stored.bits - 1)).all())
    common = {"bits": stored.bits, "group_size": stored.group_size, "desc_act": stored.desc_act, "sym": symmetric}
    layout = stored.layout
    if stored.method == "gptq":
        # Its kernels expect zero points without the offset of v1.
        parts, layout = parts | to_gptq(weight, v2=True), "gptq_v2"
    kind = choose(**common, format=layout, quant_method=stored.method, dtype=dtype, device_map={"": device}, pack=False)
    kernel = kind(
        **common,
        in_features=weight.codes.shape[1],
        out_features=weight.codes.shape[0],
        bias="bias" in parts,
        register_buffers=True,
    )
    kernel.load_state_dict(parts, strict=False)
    kernel = kernel.to(device).eval()
    kernel.post_init()
    return kernel


def _agree(kernel: nn.Module, layer: nn.Module, inputs: int, dtype: torch.dtype) -> bool:
    device = layer.get_buffer("codes").device
    x = torch.randn(8, inputs, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode():
        ours, theirs = layer(x).float(), kernel(x).float()
    difference = float((ours - theirs).norm() / ours.norm().clamp_min(1e-6))
    if not difference <= TOLERANCE:
        log.warning("a kernel of gptqmodel is off by %.1f %% and is not used", 100 * difference)
        return False
    return True
