"""Int8 linear layers whose activations keep 16 bits: for output heads, and weights that are already quantized.

An activation is split into two digits, x = scale * (high + low / 254) with both in -127 .. 127, and both go through FBGEMM's int8
kernel as two rows of one call. A decoding step reads the weights once either way, so the second digit is nearly free there
(0.90 ms instead of 0.74 ms for a head of 49,152 x 576), and the error of the activations falls from 2 % to 0.01 %. Long
prompts pay twice, and still beat fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem.kernels.int8_linear import Int8Linear, largest_code, quantize_rows
from lowmem.kernels.quantized import Quantized

LARGEST_DIGIT = 127
LOW_DIGITS = 2 * LARGEST_DIGIT
"""Low digits to one high digit: what rounding leaves is at most half of one."""

ZERO_POINT = 128
"""FBGEMM's activations are unsigned."""

OUTPUT_BYTES = 4_000_000
"""Most bytes of outputs computed at a time: FBGEMM holds four times as much meanwhile."""

ROWS_AT_ONCE = 256
"""Rows dequantized at a time while requantizing."""


class FineInt8Linear(Int8Linear):
    """`y = x W^T + b` with packed int8 weights; x and y are float32 [..., in] and [..., out]."""

    @classmethod
    def from_quantized(cls, weight: Quantized, bias: Tensor | None) -> FineInt8Linear:
        """Requantize codes of any width and grouping to int8 with one scale per row."""
        codes = torch.empty(weight.codes.shape, dtype=torch.int8)
        scales = torch.empty(len(codes), dtype=torch.float32)
        for start in range(0, len(codes), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            codes[rows], scales[rows] = quantize_rows(weight.rows(rows).dequantize(), largest_code())
        return cls(codes, scales, bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= (most := max(1, OUTPUT_BYTES // (4 * self.out_features))):
            y = self._multiply(rows)
        else:
            y = torch.empty(len(rows), self.out_features)
            for start in range(0, len(rows), most):
                y[start : start + most] = self._multiply(rows[start : start + most])
        return y.view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: Tensor) -> Tensor:
        scale = rows.abs().amax(dim=1, keepdim=True).div_(LARGEST_DIGIT).clamp_min_(torch.finfo(rows.dtype).tiny)
        digits = torch.empty(2, *rows.shape)
        torch.div(rows, scale, out=digits[1])
        torch.round(digits[1], out=digits[0])
        digits[1].sub_(digits[0]).mul_(LOW_DIGITS)
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            digits.view(-1, self.in_features), 1.0, ZERO_POINT, self._packed
        ).view(2, len(rows), self.out_features)
        y = y[0].add_(y[1], alpha=1 / LOW_DIGITS).mul_(scale)
        return y if self.bias is None else y.add_(self.bias)
