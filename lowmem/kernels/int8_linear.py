"""Dynamic int8 on the CPU: weights per output channel, activations per token, kernels of FBGEMM.

Symmetric weights W ~ scale[row] * q. FBGEMM quantizes the activations of a call with one scale for
all its tokens, so a single outlier token (the first one of a text always is) would cost all others
their precision: mean KL to fp32 0.53 on the demo model. Dividing every token by its own largest
value first, and multiplying the result, gives each token its own scale: 0.037.

Without VNNI, AVX2 adds pairs of 8-bit products in 16 bits. Keeping the weights within 7 bits makes
that exact, and costs less than the usual 7-bit activations, which carry the outliers.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from lowmem.kernels.layouts import QUANTIZED_ROWS
from lowmem.machine.processor import has_vnni


def largest_code() -> int:
    """Codes of weights reach from minus this to this on the present processor."""
    return 127 if has_vnni() else 63


def quantize_rows(weight: Tensor, largest: int = 127) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] of any float dtype -> (int8 codes [rows, columns], fp32 scales [rows])."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], dtype=torch.float32)
    for start in range(0, weight.shape[0], QUANTIZED_ROWS):
        rows = weight[start : start + QUANTIZED_ROWS].float()
        scale = rows.abs().amax(dim=1).div_(largest).clamp_min_(torch.finfo(torch.float32).tiny)
        scales[start : start + QUANTIZED_ROWS] = scale
        codes[start : start + QUANTIZED_ROWS] = (rows / scale[:, None]).round_().clamp_(-largest, largest)
    return codes, scales


class Int8Linear(nn.Module):
    """`y = x W^T + b` with packed int8 weights; x and y are float32 [..., in] and [..., out]."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """`codes` int8 [out, in], `scales` fp32 [out], as `quantize_rows` makes them."""
        super().__init__()
        self.out_features, self.in_features = codes.shape
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.quantized.engine = "fbgemm"
            # Wraps the codes in a quantized tensor without a second rounding.
            quantized = torch._make_per_channel_quantized_tensor(
                codes, scales, torch.zeros_like(scales, dtype=torch.long), 0
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.register_buffer("bias", None if bias is None else bias.float(), persistent=False)
        # Some families ask the weight of a layer for its device and dtype.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Quantize `weight` [out, in] of any float dtype."""
        return cls(*quantize_rows(weight, largest_code()), bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == self.in_features:
            # A single token has one scale anyway; decoding is spared the three operations.
            y = torch.ops.quantized.linear_dynamic(x, self._packed, False)
        else:
            # Of both signs apart: the absolute values would be a copy of the activations, and take twice as long.
            scale = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg_())
            scale.clamp_min_(torch.finfo(x.dtype).tiny)
            y = torch.ops.quantized.linear_dynamic(x / scale, self._packed, False).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)
