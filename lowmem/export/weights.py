"""Read the weights of a checkpoint for a graph: vectors, and matrices that are dense or quantized.

One matrix is in memory at a time. GPTQ and AWQ codes are used as they are, without rounding them again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowmem.errors import CorruptModel
from lowmem.kernels.packed_linear import check_shapes, read
from lowmem.kernels.quantized import Quantized
from lowmem.messages import msg
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.quantization import Quantization
from lowmem.models.spec import PACKED_PARTS
from lowmem.quant.skeleton import checked_finite


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer [out, in], fp32 or as codes, and its bias [out].

    `order`: permutation that sorts the inputs by group (int64 [in]), None if they are sorted; codes are stored sorted.
    """

    name: str
    weight: Tensor | Quantized
    bias: Tensor | None = None
    group_size: int = 0
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        codes = self.weight.codes if isinstance(self.weight, Quantized) else self.weight
        return codes.shape[0], codes.shape[1]

    def dense(self) -> Tensor:
        """fp32 [out, in], inputs in the order of `order`."""
        return self.weight.dequantize() if isinstance(self.weight, Quantized) else self.weight


class Source:
    """Reads the weights of one model by the names of its parameters.

    Args:
        names: parameter name -> stored name, see `match_names`.
        stored: the quantization of the checkpoint, None without one.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], stored: Quantization | None) -> None:
        self._checkpoint, self._names, self._stored = checkpoint, names, stored

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        """fp32, checked to be finite.

        Raises:
            CorruptModel: it has NaN or infinite values.
        """
        return checked_finite(name, self._checkpoint.read(self._names[name], torch.float32))

    def matrices(self, layers: Sequence[str]) -> list[Matrix]:
        """Layers that share an input, stacked into one matrix unless their codes are sorted differently."""
        parts = [self.matrix(layer) for layer in layers]
        first = parts[0]
        if any(_kind(part) != _kind(first) or not _same_order(part, first) for part in parts[1:]):
            return parts
        return [first if len(parts) == 1 else _stacked(parts)]

    def matrix(self, layer: str) -> Matrix:
        """The weight and bias of one linear layer."""
        bias = self.tensor(f"{layer}.bias") if self.has(f"{layer}.bias") else None
        if bias is not None and not bias.any():
            bias = None  # AutoGPTQ stores a bias of zeros where the model has none
        if self._stored is None or not self.has(f"{layer}.qweight"):
            return Matrix(layer, self.tensor(f"{layer}.weight"), bias)
        return self._packed(self._stored, layer, bias)

    def _packed(self, stored: Quantization, layer: str, bias: Tensor | None) -> Matrix:
        stored = stored.of(self._names[f"{layer}.qweight"].rpartition(".")[0])
        names = {part[1:]: self._names[layer + part] for part in PACKED_PARTS if self.has(layer + part)}
        shapes = {part: self._checkpoint.tensors[name].shape for part, name in names.items()}
        if len(shapes["qweight"]) != 2:
            raise CorruptModel(msg("{layer}.qweight is not a matrix.", layer=layer), msg("Fetch the model again."))
        rows, columns = shapes["qweight"]
        check_shapes(stored, layer, *stored.linear_shape((rows, columns)), shapes)
        weight = read(stored, layer, {part: self._checkpoint.read(name) for part, name in names.items()})
        weight, order = weight.in_group_order()
        return Matrix(layer, weight, bias, stored.group_size, order)


def _kind(matrix: Matrix) -> tuple[type, int, int]:
    bits = matrix.weight.bits if isinstance(matrix.weight, Quantized) else 0
    return type(matrix.weight), bits, matrix.group_size


def _same_order(one: Matrix, other: Matrix) -> bool:
    if one.order is None or other.order is None:
        return one.order is other.order
    return torch.equal(one.order, other.order)


def _stacked(parts: Sequence[Matrix]) -> Matrix:
    """One matrix with the outputs of all."""
    bias = None
    if any(part.bias is not None for part in parts):
        bias = torch.cat([torch.zeros(part.shape[0]) if part.bias is None else part.bias for part in parts])
    weights = [part.weight for part in parts]
    codes = [weight for weight in weights if isinstance(weight, Quantized)]
    name = f"{parts[0].name}+{'+'.join(part.name.rpartition('.')[2] for part in parts[1:])}"
    whole = joined(codes) if codes else torch.cat([part.dense() for part in parts])
    return replace(parts[0], name=name, weight=whole, bias=bias)


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Quantized matrices with the same inputs as one matrix with the outputs of all."""
    if len(parts) == 1:
        return parts[0]
    codes, scales, zeros = (torch.cat([getattr(part, key) for part in parts]) for key in ("codes", "scales", "zeros"))
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros)
