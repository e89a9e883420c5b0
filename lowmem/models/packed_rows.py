"""Tables of rows in 8, 6 or 4 bits, as lowmem stores embeddings and output heads: in files and in memory alike.

A row is a run of codes and the scales of its groups: value = scale * code, code in -2^(bits-1) .. 2^(bits-1) - 1. Codes of
8 bits are int8. Those of 4 and 6 bits are unsigned, plus 2^(bits-1), and packed so that vectors of bytes are unpacked at
once: byte j of a row in 4 bits holds the codes of columns j and j + columns/2; three bytes j of thirds of a row in 6 bits
hold the codes of columns j, j + columns/4 and j + columns/2 in their lower bits, and that of j + 3 columns/4, two bits each,
in their upper ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 codes [rows, columns] -> int8 [rows, columns] for 8 bits, else uint8 [rows, columns * bits / 8]."""
    if bits == 8:
        return codes
    unsigned = (codes + 2 ** (bits - 1)).view(torch.uint8)
    if bits == 4:
        low, high = unsigned.chunk(2, dim=1)
        return low | high << 4
    *lower, last = unsigned.chunk(4, dim=1)
    return torch.cat([part | (last >> 2 * number & 3) << 6 for number, part in enumerate(lower)], dim=1)


def unpack_rows(packed: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """The inverse of `pack_rows`; for fewer than 8 bits written to `out` (uint8 [rows, columns]) if given."""
    if bits == 8:
        return packed
    shape = len(packed), packed.shape[1] * 8 // bits
    codes = torch.empty(shape, dtype=torch.uint8, device=packed.device) if out is None else out
    if bits == 4:
        low, high = codes.chunk(2, dim=1)
        torch.bitwise_and(packed, 15, out=low)
        torch.bitwise_right_shift(packed, 4, out=high)
    else:
        *lower, last = codes.chunk(4, dim=1)
        for number, (part, source) in enumerate(zip(lower, packed.chunk(3, dim=1), strict=True)):
            torch.bitwise_and(source, 63, out=part)
            upper = (source >> 6).bitwise_left_shift_(2 * number)
            last.bitwise_or_(upper) if number else last.copy_(upper)
    return codes.view(torch.int8).sub_(2 ** (bits - 1))


def dequantize_rows(packed: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows [rows, columns] in `dtype`; `scales` is [rows, groups]."""
    values = unpack_rows(packed, bits).to(dtype)
    values.unflatten(1, (scales.shape[1], -1)).mul_(scales.to(dtype).unsqueeze(-1))
    return values
