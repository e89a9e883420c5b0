"""Embeddings and output heads that compute with one packed table (`models.packed_rows`), shared where the two are tied.

An embedding dequantizes the rows that its ids name. A head multiplies by the table tile by tile, and no more than a tile is
ever dequantized. In 8 bits on processors with VNNI not even that: `torch._int_mm` reads the codes as they lie, activations
are split into two digits of 8 bits as in `int8_fine`, and the product with the codes is exact. One row takes a third of the
time of an fp32 head then; with 4 bits 1.7 times as long as fp32, with 6 bits 3.1 times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowmem.kernels.int8_fine import LARGEST_DIGIT, LOW_DIGITS
from lowmem.kernels.layouts import ROWS_AT_WORK_BYTES, rows_group
from lowmem.machine.processor import has_vnni
from lowmem.models.packed_rows import dequantize_rows, pack_rows, unpack_rows

TILE_BYTES = {"cpu": 4_000_000, "cuda": 64_000_000}
"""fp32 bytes of the rows that are dequantized at a time."""

INT8_TILE = 4096
"""Rows of a product in int8: what fits a core's cache, where the second digit finds it."""

INT8_INPUTS = 32
"""Most inputs that are multiplied at once."""


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round `weight` [rows, columns] of any float dtype to the grid of each group: packed codes and scales.

    The scale is what the largest value of a group needs. Smaller scales that clip it have a smaller squared error, but cost
    more quality: in 4 bits a mean KL of 0.17 instead of 0.10 on the demo model.
    """
    groups = weight.float().unflatten(1, (-1, rows_group(weight.shape[1], bits)))
    largest = 2 ** (bits - 1) - 1
    scales = groups.abs().amax(-1, keepdim=True).div_(largest if bits == 8 else largest + 0.5)
    stored = scales.squeeze(-1).to(scales_dtype(bits))
    scales = stored.float().unsqueeze(-1)
    codes = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-largest - 1, largest)
    return pack_rows(codes.to(torch.int8).flatten(1), bits), stored


def scales_dtype(bits: int) -> torch.dtype:
    return torch.float32 if bits == 8 else torch.float16


class PackedRows:
    """A table [rows, columns] in `bits` bits; see `models.packed_rows` for `codes` and `scales`."""

    def __init__(self, codes: Tensor, scales: Tensor, bits: int) -> None:
        self.codes, self.scales, self.bits = codes, scales, bits
        self.rows, self.columns = len(codes), codes.shape[1] * 8 // bits

    @classmethod
    def quantized(cls, shape: tuple[int, int], read: Callable[[int, int], Tensor], bits: int) -> PackedRows:
        """The table of a weight of `shape`; `read` returns its rows from one (inclusive) to another (exclusive)."""
        rows, columns = shape
        step = max(1, ROWS_AT_WORK_BYTES // (4 * columns))
        codes = torch.empty(rows, columns * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
        scales = torch.empty(rows, columns // rows_group(columns, bits), dtype=scales_dtype(bits))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            codes[start:stop], scales[start:stop] = quantize_rows(read(start, stop), bits)
        return cls(codes, scales, bits)

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(self.codes.to(device), self.scales.to(device), self.bits)

    def gather(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of `ids` [...]: [..., columns]."""
        flat = ids.reshape(-1)
        return dequantize_rows(self.codes[flat], self.scales[flat], self.bits, dtype).view(*ids.shape, self.columns)

    def multiply(self, x: Tensor) -> Tensor:
        """`x W^T` [n, rows] for `x` [n, columns], in the dtype of `x`."""
        if self.bits == 8 and x.device.type == "cpu" and x.dtype == torch.float32 and has_vnni():
            return torch.cat([self._multiply_codes(part) for part in x.split(INT8_INPUTS)])
        step = min(self.rows, max(1, TILE_BYTES.get(x.device.type, TILE_BYTES["cuda"]) // (4 * self.columns)))
        y, tile = x.new_empty(len(x), self.rows), x.new_empty(step, self.columns)
        codes = torch.empty(step, self.columns, dtype=torch.uint8, device=x.device)
        groups = self.scales.shape[1]
        for start in range(0, self.rows, step):
            here = slice(start, min(start + step, self.rows))
            count = here.stop - here.start
            part = tile[:count].copy_(unpack_rows(self.codes[here], self.bits, codes[:count]))
            part.unflatten(1, (groups, -1)).mul_(self.scales[here].to(x.dtype).unsqueeze(-1))
            torch.mm(x, part.t(), out=y[:, here])
        return y

    def _multiply_codes(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=1, keepdim=True).div_(LARGEST_DIGIT).clamp_min_(torch.finfo(x.dtype).tiny)
        exact = x / scale
        high = exact.round()
        low = exact.sub_(high).mul_(LOW_DIGITS).round_()
        count = len(x)
        # One column at a time is multiplied without rearranging the table.
        digits = [part.to(torch.int8).t() for part in ((high, low) if count == 1 else (torch.cat([high, low]),))]
        y = x.new_empty(count, self.rows)
        for start in range(0, self.rows, INT8_TILE):
            here = slice(start, start + INT8_TILE)
            parts = [torch._int_mm(self.codes[here], digit).float() for digit in digits]
            first, second = parts if count == 1 else parts[0].split(count, dim=1)
            torch.mul(first.add_(second, alpha=1 / LOW_DIGITS).t(), self.scales[here].t(), out=y[:, here])
        return y.mul_(scale)


class _Packed(nn.Module):
    """Holds a table as buffers, so that it is counted and found where a model's tensors are."""

    def __init__(self, rows: PackedRows, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.dtype = rows, dtype
        self.register_buffer("codes", rows.codes, persistent=False)
        self.register_buffer("scales", rows.scales, persistent=False)
        # Some families ask the weight of a layer for its device and dtype.
        self.register_buffer("weight", torch.empty(0, dtype=dtype, device=rows.codes.device), persistent=False)


class PackedEmbedding(_Packed):
    """ids [...] -> `factor` (Gemma's) times their rows, [..., columns] in `dtype`."""

    def __init__(self, rows: PackedRows, dtype: torch.dtype, factor: float = 1.0) -> None:
        super().__init__(rows, dtype)
        self.num_embeddings, self.embedding_dim = rows.rows, rows.columns
        self._factor = factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows.gather(ids, self.dtype)
        return rows if self._factor == 1.0 else rows.mul_(torch.tensor(self._factor, dtype=self.dtype))


class PackedHead(_Packed):
    """`y = x W^T + b` by a packed table; x and y are [..., columns] and [..., rows] of one dtype."""

    bias: Tensor | None

    def __init__(self, rows: PackedRows, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(rows, dtype)
        self.out_features, self.in_features = rows.rows, rows.columns
        self.register_buffer("bias", None if bias is None else bias.to(rows.codes.device, dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows.multiply(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias)
