"""bitsandbytes layers: LLM.int8 (arXiv 2208.07339) and NF4 with double quantization (arXiv 2305.14314)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowmem.errors import CorruptModel, MissingDependency
from lowmem.kernels.quantized import Packed, relative_loss
from lowmem.messages import msg

OUTLIER_THRESHOLD = 6.0


def linear8(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """LLM.int8 layer: int8 weights with a scale per row; activation columns above 6.0 stay in half precision."""
    bnb = _bitsandbytes()
    rows, columns = weight.shape
    layer = bnb.nn.Linear8bitLt(
        columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)
    return _finished(layer, bias, device, dtype)


def linear4(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """NF4 layer in blocks of 64 with double-quantized scales, computing in `dtype`."""
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


def packed8(weight: Tensor) -> Packed:
    """LLM.int8 of `weight` [out, in] as bitsandbytes stores it."""
    codes, largest, _ = _bitsandbytes().functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    loss = relative_loss(weight, lambda rows: codes[rows].float() * largest[rows, None] / 127)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Packed(tensors, loss)


def packed4(weight: Tensor, block: int, kind: str, double: bool, compute: str) -> Packed:
    """NF4 or FP4 of `weight` [out, in] as bitsandbytes stores it; `compute` is the compute dtype that is recorded for readers."""
    functional = _bitsandbytes().functional
    original = weight.float().contiguous()
    codes, state = functional.quantize_4bit(original, blocksize=block, compress_statistics=double, quant_type=kind)
    error = functional.dequantize_4bit(codes, state).sub_(original).square_().sum()
    state.dtype = getattr(torch, compute)
    parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return Packed({"weight": codes} | parts, float(error / original.square_().sum().clamp_min(1e-30)))


def stored8(parts: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """LLM.int8 layer from the tensors that `packed8` or bitsandbytes stored."""
    bnb = _bitsandbytes()
    rows, columns = parts["weight"].shape
    bias = parts.get("bias")
    layer = bnb.nn.Linear8bitLt(
        columns, rows, bias=bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    codes, largest = parts["weight"].to(device), parts["SCB"].float().to(device)
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=largest)
    return _with_bias(layer, bias, device, dtype)


def stored4(
    name: str, parts: dict[str, Tensor], outputs: int, inputs: int, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """4-bit layer from the tensors that `packed4` or bitsandbytes stored.

    Raises:
        CorruptModel: its quantization state cannot be read, or belongs to another layer.
    """
    bnb = _bitsandbytes()
    bias = parts.get("bias")
    described = {part.removeprefix("weight."): value for part, value in parts.items() if part.startswith("weight.")}
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=bias is not None, compute_dtype=dtype, device="meta")
    try:
        layer.weight = bnb.nn.Params4bit.from_prequantized(parts["weight"], described, device=device, module=layer)
        state = layer.weight.quant_state
        fits = tuple(state.shape) == (outputs, inputs) and 2 * parts["weight"].numel() == outputs * inputs
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        fits = False
    if not fits:
        raise CorruptModel(
            msg(
                "{name} does not contain {outputs:,} x {inputs:,} bitsandbytes weights.",
                name=name,
                outputs=outputs,
                inputs=inputs,
            ),
            msg("Fetch the model again."),
        )
    state.dtype = dtype
    return _with_bias(layer, bias, device, dtype)


def _finished(layer: nn.Module, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    # Moving the weight to its device is what quantizes it.
    layer.weight = layer.weight.to(device)
    return _with_bias(layer, bias, device, dtype)


def _with_bias(layer: nn.Module, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(device=device, dtype=dtype), requires_grad=False)
    return layer


def _bitsandbytes():  # type: ignore[no-untyped-def]
    try:
        import bitsandbytes
    except ImportError:
        raise MissingDependency(msg("bitsandbytes is not installed."), "pip install bitsandbytes") from None
    return bitsandbytes
