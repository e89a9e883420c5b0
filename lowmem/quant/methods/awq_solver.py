"""Round to nearest within ranges that are clipped so that a layer's outputs change least, as in AWQ (arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowmem.events import CancelToken
from lowmem.kernels.grid import fit, nearest
from lowmem.kernels.quantized import WHOLE_ROW, Quantized, consecutive, row_slices
from lowmem.quant.base import Options
from lowmem.quant.hessian import Hessian

ROWS_BYTES = 16_000_000
"""fp32 bytes of the weights searched at a time."""


def quantize_clipped(weight: Tensor, hessian: Hessian, options: Options, clip: bool, cancel: CancelToken) -> Quantized:
    """Quantize `weight` [out, in]; each group weighs its errors by its diagonal block of the Hessian."""
    rows, columns = weight.shape
    size = columns if options.group_size == WHOLE_ROW else options.group_size
    groups = consecutive(columns, size, weight.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // size, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(rows, columns // size, dtype=torch.uint8, device=weight.device)
    step = max(1, ROWS_BYTES // (4 * size))
    for group in range(columns // size):
        inputs = slice(group * size, (group + 1) * size)
        importance = hessian.matrix[inputs, inputs]
        for start in range(0, rows, step):
            cancel.check()
            here = slice(start, start + step)
            part = weight[here, inputs].float()
            scale, zero = fit(part, options.bits, options.symmetric, importance, clip)
            codes[here, inputs] = nearest(part, scale, zero, options.bits).to(torch.uint8)
            scales[here, group], zeros[here, group] = scale.squeeze(1).half(), zero.squeeze(1).to(torch.uint8)
    result = Quantized(codes, scales, zeros, groups, options.bits)
    return replace(result, loss=_loss(result, weight, hessian, cancel))


def _loss(result: Quantized, weight: Tensor, hessian: Hessian, cancel: CancelToken) -> float:
    """See `Quantized.loss`."""
    error = size = 0.0
    for rows in row_slices(weight.shape[0], weight.shape[1], ROWS_BYTES):
        cancel.check()
        original = weight[rows].float()
        error += hessian.output_error(result.rows(rows).dequantize() - original)
        size += hessian.output_error(original)
    return error / max(size, 1e-30)
