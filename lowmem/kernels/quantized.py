"""Quantized weight matrices: integer codes, with a scale and a zero point per group of inputs.

A weight is stored as a code q in 0 .. 2^bits - 1 and read as scale * (q - zero). Whatever layout the codes come in (GPTQ's or
AWQ's words, bytes, the blocks of MatMulNBits), they are dequantized by `dequantize_` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem.kernels.layouts import NBITS

WHOLE_ROW = -1
"""The group size for one scale per row."""

ROWS_BYTES = 1_000_000
"""fp32 bytes of the rows processed at a time: three times as fast as whole matrices, since they stay in a core's cache."""


def dequantize_(codes: Tensor, scales: Tensor, zeros: Tensor, groups: int | Tensor, dim: int = 0) -> Tensor:
    """Turn codes into weights in place, (codes - zeros) * scales, and return them.

    Args:
        codes: [in, out] for `dim` 0, [out, in] for 1, already in the dtype of the result.
        scales, zeros: [groups, out] or [out, groups].
        groups: inputs per group where groups are runs of inputs (the last may be shorter), else the group of each input [in].
        dim: the dimension of the inputs.
    """
    if isinstance(groups, Tensor):
        return codes.sub_(zeros.index_select(dim, groups)).mul_(scales.index_select(dim, groups))
    whole, rest = divmod(codes.shape[dim], groups)
    if whole:
        full = codes.narrow(dim, 0, whole * groups).unflatten(dim, (whole, groups))
        full.sub_(zeros.narrow(dim, 0, whole).unsqueeze(dim + 1)).mul_(scales.narrow(dim, 0, whole).unsqueeze(dim + 1))
    if rest:
        last = codes.narrow(dim, whole * groups, rest)
        last.sub_(zeros.narrow(dim, whole, 1)).mul_(scales.narrow(dim, whole, 1))
    return codes


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized weight matrix, independent of any container's layout.

    Args:
        codes: uint8 [out, in].
        scales: fp16 [out, groups].
        zeros: uint8 [out, groups], the codes that stand for 0.
        groups: int32 [in], the group of each input.
        bits: width of a code: 2, 3, 4 or 8.
        loss: relative squared error of the layer's outputs on the calibration text, of the weights without one.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor
    bits: int
    loss: float = 0.0

    @property
    def block_bits(self) -> int:
        """Width of a code in `blocks`: MatMulNBits has no fast kernel for fewer than 4 bits."""
        return max(NBITS, self.bits)

    def rows(self, here: slice) -> Quantized:
        """Some of the rows, sharing memory."""
        return replace(self, codes=self.codes[here], scales=self.scales[here], zeros=self.zeros[here])

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The weights as fp32 [out, in], exactly as readers of the stored form compute them; written to `out` if given."""
        rows, columns = self.codes.shape
        if out is None:
            out = torch.empty(rows, columns, device=self.codes.device)
        groups = self.groups.long()
        for here in row_slices(rows, columns):
            out[here] = dequantize_(
                self.codes[here].float(), self.scales[here].float(), self.zeros[here].float(), groups, dim=1
            )
        return out

    def in_group_order(self) -> tuple[Quantized, Tensor | None]:
        """The matrix with its inputs sorted by group, and their order (int64 [in]), None if they were in order already."""
        if bool((self.groups[1:] >= self.groups[:-1]).all()):
            return self, None
        order = torch.argsort(self.groups, stable=True)
        return replace(self, codes=self.codes.index_select(1, order), groups=self.groups[order]), order

    def blocks(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """MatMulNBits' inputs: codes [out, blocks, bytes], fp32 scales [out, blocks] and zero points [out, bytes].

        Args:
            size: inputs per block; it divides the groups, which must be in order.
        """
        outputs, inputs = self.codes.shape
        bits, count = self.block_bits, -(-inputs // size)
        groups = self.groups[::size].long()
        codes = torch.nn.functional.pad(self.codes, (0, count * size - inputs))
        return (
            pack_bytes(codes, bits, dim=1).view(outputs, count, -1),
            self.scales.float()[:, groups],
            pack_bytes(self.zeros[:, groups], bits, dim=1),
        )


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized layer as it is stored, from a method with a layout of its own.

    Args:
        tensors: by the last part of their names.
        loss: relative squared error of the weights.
    """

    tensors: dict[str, Tensor]
    loss: float


def pack_bytes(codes: Tensor, bits: int, dim: int) -> Tensor:
    """Pack uint8 codes along `dim` into bytes, the first code in the lowest bits; the last byte is filled with zeros.

    Args:
        codes: [n, m]; `bits` of each are used: 2, 4 or 8.
    """
    lanes = 8 // bits
    if missing := -codes.shape[dim] % lanes:
        codes = torch.nn.functional.pad(codes, (0, missing) if dim == 1 else (0, 0, 0, missing))
    parts = [codes[lane::lanes] if dim == 0 else codes[:, lane::lanes] for lane in range(lanes)]
    packed = (parts[-1] << (lanes - 1) * bits).contiguous()
    for lane in range(lanes - 1):
        packed |= parts[lane] << lane * bits if lane else parts[lane]
    return packed


def unpack_lanes(packed: Tensor, bits: int, lanes: list[Tensor], spare: Tensor | None = None) -> None:
    """Write code i of every element of `packed`, counted from the lowest bits, into `lanes[i]`, whatever its dtype."""
    spare = torch.empty_like(packed) if spare is None else spare
    for lane, target in enumerate(lanes):
        torch.bitwise_right_shift(packed, lane * bits, out=spare)
        target.copy_(spare.bitwise_and_(largest_code(bits)))


def row_slices(rows: int, columns: int, most_bytes: int = ROWS_BYTES) -> Iterator[slice]:
    """Runs of rows that take at most `most_bytes` in fp32."""
    step = max(1, most_bytes // (4 * columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def largest_code(bits: int) -> int:
    return 2**bits - 1


def consecutive(columns: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """The group of each input when groups are runs of `group_size` inputs: int32 [columns]."""
    size = columns if group_size == WHOLE_ROW else group_size
    return torch.arange(columns, dtype=torch.int32, device=device) // size


def relative_loss(weight: Tensor, read: Callable[[slice], Tensor]) -> float:
    """Squared error of what `read` returns for rows of `weight`, over the squared weights."""
    error = size = 0.0
    for start in range(0, len(weight), 256):
        rows = slice(start, start + 256)
        original = weight[rows].float()
        error += float((read(rows) - original).square().sum())
        size += float(original.square().sum())
    return error / max(size, 1e-30)
