"""Turns the encoded weights of a checkpoint into weights that are computed from codes and scales when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem.models.encoded import MXFP4, NVFP4, ROWS, WORDS, Encoded, encoded
from lowmem.models.entries import Converted, Source
from lowmem.models.packed_rows import dequantize_rows

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a code of 4 bits (E2M1)."""

FP4_GROUP = 32
"""Codes that share a scale in MXFP4."""


def dequantize_entries(tensors: dict[str, Source], described: Mapping[str, Any]) -> None:
    """Replace the codes and scales of encoded weights by the weights, under the names that dense weights would have."""
    for one in encoded(tensors, described):
        sources = [tensors[name] for name in one.parts]
        for name in one.parts:
            del tensors[name]
        dtype = "bf16" if one.kind == MXFP4 else "fp32"  # exact: a value of 4 bits and a power of 2
        tensors[one.name] = Converted(dtype, one.shape, tuple(sources), _Dequantize(one), _steps(one, sources))


def packed_rows(entry: Source) -> Encoded | None:
    """The packed table that a tensor of a checkpoint is computed of, None if it is not stored as one."""
    one = entry.convert.one if isinstance(entry, Converted) and isinstance(entry.convert, _Dequantize) else None
    return one if one is not None and one.kind == ROWS else None


def _steps(one: Encoded, sources: list[Any]) -> tuple[int, ...]:
    """Rows of the weight that belong to a row of each source; 0 for a source that every row needs."""
    stacked = len(one.shape) > 2
    steps = []
    for name, source in zip(one.parts, sources, strict=True):
        if name == one.codes or stacked:
            steps.append(1)
        elif name == one.order or source.shape in ((), (1,)) or (name != one.scales[0] and name in one.scales):
            steps.append(0)
        elif name == one.zeros and one.kind == WORDS:
            steps.append(32 // one.bits)
        else:
            steps.append(one.block[0] if source.shape[0] > 1 else 0)
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class _Dequantize:
    """Dequantizes rows of a weight, given the rows of its parts."""

    one: Encoded

    def __call__(self, parts: list[Tensor]) -> Tensor:
        one = self.one
        read = dict(zip(one.parts, parts, strict=True))
        codes, scales = read[one.codes], read[one.scales[0]]
        if one.kind == ROWS:
            return dequantize_rows(codes, scales, one.bits)
        if one.kind == MXFP4:
            values = _mxfp4(codes, scales)
            return values if one.name + "_packed" == one.codes else values.transpose(-1, -2)
        if one.kind == NVFP4:
            values, scales = _fp4(codes, torch.float32), scales.float()
            if len(one.scales) > 1:
                whole = read[one.scales[1]].float()
                scales = scales / whole if one.divides else scales * whole
        elif one.kind == WORDS:
            values = unpack_words(codes, one.bits).float()
        else:
            values = codes.float()
        offset = 1 << one.bits - 1 if one.kind == WORDS else 0
        order = read[one.order].long().clamp_min(0) if one.order else None
        if one.zeros:
            zeros = read[one.zeros]
            zeros = unpack_words(zeros.t(), one.bits).t()[: len(values)] if one.kind == WORDS else zeros
            self._apply(Tensor.sub_, values, zeros.float(), order)
        elif offset:
            values.sub_(offset)
        self._apply(Tensor.mul_, values, scales.float(), order)
        return values

    def _apply(
        self, change: Callable[[Tensor, Tensor], Tensor], values: Tensor, grid: Tensor, order: Tensor | None
    ) -> None:
        """Change `values` in place by a scale or zero point each, given those of blocks [.., down, across]."""
        if grid.numel() == 1:
            change(values, grid.reshape(()))
            return
        if grid.dim() == values.dim() - 1 and grid.shape[-1] == values.shape[-2]:
            grid = grid[..., None]  # one per row
        grid = grid.reshape(*grid.shape, *(1,) * (values.dim() - grid.dim()))
        rows, columns = self.one.block
        if grid.shape[-1] > 1:
            grid = grid.index_select(-1, order) if order is not None else grid.repeat_interleave(columns, -1)
            grid = grid[..., : values.shape[-1]]
        if rows == 1 or grid.shape[-2] == 1:
            change(values, grid)
            return
        for number, start in enumerate(range(0, values.shape[-2], rows)):
            change(values[..., start : start + rows, :], grid[..., number : number + 1, :])


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The unsigned codes in 32-bit words [rows, n], lowest bits first: int32 [rows, n * (32 // bits)]."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(-2)


def _fp4(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of two codes a byte, the first in the lower half: [..., 2 n] of [..., n]."""
    table = torch.tensor(FP4, dtype=dtype)
    values = torch.empty(*codes.shape, 2, dtype=dtype)
    values[..., 0] = table[(codes & 15).int()]
    values[..., 1] = table[(codes >> 4).int()]
    return values.flatten(-2)


def _mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """bf16 [..., rows, columns]: codes are [..., rows, groups, 16] or [..., rows, columns / 2] bytes, scales exponents."""
    flat = codes.reshape(*scales.shape, FP4_GROUP // 2)
    values = torch.ldexp(_fp4(flat, torch.bfloat16), scales.int()[..., None] - 127)
    return values.to(torch.bfloat16).flatten(-2)
