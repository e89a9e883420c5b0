"""bitsandbytes layers: LLM.int8 (arXiv 2208.07339) and NF4 with double quantization (arXiv 2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.errors import MissingDependency

OUTLIER_THRESHOLD = 6.0


def linear8(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """LLM.int8: row-wise int8 weights; activation columns above 6.0 stay in half precision."""
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(
        columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    return _finished(layer, bias, device, dtype)


def linear4(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """NF4 in blocks of 64 with double-quantized absmax; computes in `dtype`."""
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns,
        rows,
        bias=bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return _finished(layer, bias, device, dtype)


def _finished(layer: nn.Module, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    # Moving the weight to its device is what quantizes it.
    layer.weight = layer.weight.to(device)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device=device, dtype=dtype), requires_grad=False)
    return layer


def _bitsandbytes():  # type: ignore[no-untyped-def]
    try:
        import bitsandbytes
    except ImportError:
        raise MissingDependency("bitsandbytes is not installed.", "pip install bitsandbytes") from None
    return bitsandbytes
