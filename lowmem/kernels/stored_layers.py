"""Layers that compute with weights as files store them: in another dtype, or packed in 2 to 8 bits.

Only stored bytes cross disks and buses; weights are converted or dequantized on the device that computes, on a CPU tile by
tile within its caches, on a GPU layer by layer.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.kernels.layouts import TILE_BYTES
from lowmem.kernels.packed_linear import read
from lowmem.kernels.packing import AWQ_ORDER, awq_codes, gptq_zeros
from lowmem.kernels.quantized import dequantize_, unpack_lanes
from lowmem.models.quantization import Quantization

FEW_ROWS = 64
"""Up to this many rows it is cheaper to scale the products of each group than the weights."""

_local = threading.local()


def _scratch(key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialized tensor of `shape` and the dtype of `like`, reused by the next call of the same thread."""
    held: dict[str, Tensor] = _local.__dict__.setdefault("held", {})
    count = torch.Size(shape).numel()
    buffer = held.get(key)
    if buffer is None or buffer.numel() < count or buffer.dtype != like.dtype or buffer.device != like.device:
        buffer = held[key] = torch.empty(count, dtype=like.dtype, device=like.device)
    return buffer[:count].view(shape)


def free_scratch() -> None:
    """Free the tiles of this thread."""
    _local.__dict__.pop("held", None)


def _tile(inputs: int, outputs: int, device: torch.device) -> int:
    """Outputs per tile."""
    if device.type != "cpu":
        return outputs
    return min(outputs, max(32, TILE_BYTES // (4 * inputs) // 32 * 32))


class StoredLinear(nn.Module):
    """`y = x W^T + b` in the dtype of x, whatever the stored dtype of W.

    Args:
        transposed: W is stored [in, out], as in GPT-2's Conv1D.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> None:
        super().__init__()
        self._transposed = transposed
        outputs, inputs = weight.shape[::-1] if transposed else weight.shape
        self.out_features, self.in_features = outputs, inputs
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self._transposed else self.weight
        rows = x.reshape(-1, self.in_features)
        y = x.new_empty(len(rows), self.out_features)
        step = _tile(self.in_features, self.out_features, x.device)
        for start in range(0, self.out_features, step):
            part = weight[start : start + step]
            tile = part if part.dtype == x.dtype else _scratch("tile", tuple(part.shape), x).copy_(part)
            torch.mm(rows, tile.t(), out=y[:, start : start + step])
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


class StoredInt8(StoredLinear):
    """`y = x (s W)^T + b` with int8 codes W [out, in] and one scale a row, in `scale` [out] or [out, 1].

    Args:
        largest: the code that stands for a scale: 1 for compressed-tensors, 127 for bitsandbytes.
    """

    weight_scale: Tensor | None
    SCB: Tensor | None

    def __init__(self, weight: Tensor, largest: int) -> None:
        super().__init__(weight, None)
        self._largest = largest
        for part in ("weight_scale", "SCB"):
            self.register_parameter(part, None)

    def forward(self, x: Tensor) -> Tensor:
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            y = super().forward(x)
        finally:
            self._parameters["bias"] = bias
        scale = self.SCB if self.weight_scale is None else self.weight_scale
        assert scale is not None  # one of them is stored
        y *= scale.view(-1).to(y.dtype) / self._largest
        return y if bias is None else y.add_(bias.to(y.dtype))


class StoredNf4(nn.Module):
    """`y = x W^T + b` with 4-bit codes of bitsandbytes; their quantization state (`state`) stays resident."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, state: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.state = inputs, outputs, state
        self.described: tuple[str, ...] = ()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        dense = dequantize_4bit(self.weight, self.state).to(x.dtype)
        return nn.functional.linear(x, dense, None if self.bias is None else self.bias.to(x.dtype))


class StoredEmbedding(nn.Module):
    """Embedding whose table keeps its stored dtype; returns rows in `dtype`, times `factor` (Gemma's): ids [...] -> [..., hidden]."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._dtype, self._factor = dtype, factor

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight).to(self._dtype)
        return rows if self._factor == 1.0 else rows * torch.tensor(self._factor, dtype=self._dtype)


class StoredPacked(nn.Module):
    """`y = x W^T + b` from the stored tensors of a GPTQ or AWQ layer (Frantar et al. 2022, Lin et al. 2023).

    Args:
        stored: the checkpoint's quantization.
        name: of the layer, for errors.
        inputs, outputs: its shape.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(self, stored: Quantization, name: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self._stored, self._name = stored, name
        self.in_features, self.out_features = inputs, outputs
        self._group = stored.group_size if stored.group_size > 0 else inputs
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            self.register_parameter(part, None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = x.new_empty(len(rows), self.out_features)
        step = _tile(self.in_features, self.out_features, x.device)
        groups = self._groups()
        even = isinstance(groups, int) and self.in_features % groups == 0
        few = len(rows) <= FEW_ROWS and x.dtype == torch.float32 and even and self._stored.bits != 3
        thin = rows / self._places(x) if few else None
        for start in range(0, self.out_features, step):
            outputs = slice(start, min(start + step, self.out_features))
            if thin is not None:
                self._multiply_few(rows, thin, outputs, y[:, outputs])
            else:
                self._multiply(rows, outputs, groups, y[:, outputs])
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _groups(self) -> int | Tensor:
        """Inputs per group, or the group of every input (int64 [in]) where act-order scatters them."""
        if self._stored.desc_act and self.g_idx is not None and self._stored.group_size > 0:
            return self.g_idx.long()
        return self._group

    def _multiply(self, rows: Tensor, outputs: slice, groups: int | Tensor, out: Tensor) -> None:
        """Many rows: dequantize a tile of the weights, then multiply."""
        if self._stored.bits == 3:
            torch.mm(rows, self._general(outputs, rows.dtype).t(), out=out)
            return
        torch.mm(rows, dequantize_(self._codes(outputs, rows), *self._grid(outputs, rows.dtype), groups), out=out)

    def _multiply_few(self, rows: Tensor, thin: Tensor, outputs: slice, out: Tensor) -> None:
        """Few rows: multiply the codes, then scale the sums of each group."""
        scales, zeros = self._grid(outputs, rows.dtype)
        grouped = self._codes(outputs, rows, in_place=True).view(len(scales), self._group, -1)
        parts = thin.view(len(rows), len(scales), self._group)
        products = torch.bmm(parts.transpose(0, 1), grouped)  # [groups, rows, outputs]
        torch.sum(products.mul_(scales[:, None]), 0, out=out)
        out.addmm_(rows.view(parts.shape).sum(-1), zeros.mul_(scales), alpha=-1)

    def _grid(self, outputs: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales and zero points [groups, outputs]."""
        return self.scales[:, outputs].to(dtype), self._zeros(outputs).to(dtype)

    def _places(self, like: Tensor) -> Tensor:
        """Factors [in] that `_codes` with `in_place` leaves in the codes: powers of two, so dividing by them is exact."""
        bits, lanes = self._stored.bits, 32 // self._stored.bits
        if self._stored.method == "awq":  # where inputs are rows of words
            return like.new_ones(self.in_features)
        places = like.new_tensor([2.0 ** (lane * bits) for lane in range(lanes - 1)] + [1.0])
        return places.repeat(-(-self.in_features // lanes))[: self.in_features]

    def _codes(self, outputs: slice, like: Tensor, in_place: bool = False) -> Tensor:
        """Codes [in, outputs] in the dtype of `like`.

        Args:
            in_place: leave them multiplied by `_places`, which saves a third of the work: bits are masked but not shifted
                down, except for the last code of a word, which holds its sign.
        """
        bits, lanes = self._stored.bits, 32 // self._stored.bits
        width = outputs.stop - outputs.start
        if self._stored.method == "awq":
            in_place = False
            words = self.qweight[:, outputs.start // lanes : outputs.stop // lanes]
            tile = _scratch("tile", (self.in_features, width), like)
            split = tile.view(self.in_features, -1, lanes)
            targets = [split[:, :, place] for place in AWQ_ORDER]
        else:
            words = self.qweight[:, outputs]
            tile = _scratch("tile", (len(words) * lanes, width), like)
            split = tile.view(-1, lanes, width)
            targets = [split[:, lane] for lane in range(lanes)]
        spare = _scratch("words", tuple(words.shape), words)
        if not in_place:
            unpack_lanes(words, bits, targets, spare)
            return tile[: self.in_features]
        for lane, target in enumerate(targets[:-1]):
            target.copy_(torch.bitwise_and(words, ((1 << bits) - 1) << lane * bits, out=spare))
        torch.bitwise_right_shift(words, (lanes - 1) * bits, out=spare)
        targets[-1].copy_(spare.bitwise_and_((1 << bits) - 1))
        return tile[: self.in_features]

    def _zeros(self, outputs: slice) -> Tensor:
        """Zero points [groups, outputs]."""
        bits, lanes = self._stored.bits, 32 // self._stored.bits
        words = self.qzeros[:, outputs.start // lanes : -(-outputs.stop // lanes)]
        if self._stored.method == "awq":
            return awq_codes(words)
        return gptq_zeros(words, bits, outputs.stop - outputs.start, v2=self._stored.layout == "gptq_v2")

    def _general(self, outputs: slice, dtype: torch.dtype) -> Tensor:
        """Dequantized weights [outputs, in] of layouts whose codes cross words."""
        bits = self._stored.bits
        words = slice(outputs.start * bits // 32, -(-outputs.stop * bits // 32))
        parts: dict[str, Any] = {
            "qweight": self.qweight[:, outputs],
            "qzeros": self.qzeros[:, words],
            "scales": self.scales[:, outputs],
        }
        parts |= {} if self.g_idx is None else {"g_idx": self.g_idx}
        return read(self._stored, self._name, parts).dequantize().to(dtype)
