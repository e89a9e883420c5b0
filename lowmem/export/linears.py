"""How a graph computes a linear layer: dense, in blocks of 4 or 8 bits, or in dynamic int8.

Each class writes the nodes and the weights of one `Matrix` and returns the name of the product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.nn import functional

from lowmem.events import CancelToken
from lowmem.export.graph import Graph
from lowmem.export.weights import Matrix
from lowmem.kernels.grid import Choice, fit, fit_closely, nearest, quantize_rows
from lowmem.kernels.int8_linear import quantize_rows as quantize_int8
from lowmem.kernels.layouts import GRAPH_BLOCK, block_size
from lowmem.kernels.quantized import Quantized

INT8_ARITHMETIC = 4
"""The accuracy level of MatMulNBits that quantizes activations to int8 per block: twice as fast as fp32."""


LARGEST_ACTIVATION = 127


class Linear(Protocol):
    """Writes `y = x W^T + b`; returns the name of y."""

    def __call__(self, graph: Graph, x: str, matrix: Matrix) -> str: ...

    def rounded(self, matrix: Matrix) -> Tensor:
        """The weight that the graph multiplies by, in fp32 [out, in]."""


@dataclass(frozen=True)
class Dense:
    """MatMul in `dtype` (float32 or float16)."""

    dtype: type = np.float32

    def __call__(self, graph: Graph, x: str, matrix: Matrix) -> str:
        x = _ordered(graph, x, matrix)
        name = f"{matrix.name}.weight"
        weight = name if graph.known(name) else graph.weight(name, matrix.dense().t().numpy().astype(self.dtype))
        y = graph.add("MatMul", (x, weight))
        return y if matrix.bias is None else graph.add("Add", (y, _bias(graph, matrix, self.dtype)))

    def rounded(self, matrix: Matrix) -> Tensor:
        return as_dtype(matrix.dense(), self.dtype)


@dataclass(frozen=True)
class Blocks:
    """MatMulNBits: codes with a scale, and for 4 bits a zero point, for every block of inputs.

    Codes of a quantized checkpoint are kept; dense weights are quantized by `quantize`.
    """

    quantize: Callable[[Tensor], Quantized]
    bits: int
    group_size: int
    accuracy: int = INT8_ARITHMETIC

    def __call__(self, graph: Graph, x: str, matrix: Matrix) -> str:
        x = _ordered(graph, x, matrix)
        weights = self.store(graph, matrix)
        bias = () if matrix.bias is None else ("", _bias(graph, matrix, np.float32))
        outputs, inputs = matrix.shape
        return graph.contrib(
            "MatMulNBits",
            (x, *weights, *bias),
            K=inputs,
            N=outputs,
            bits=self.bits_of(matrix),
            block_size=self._block(matrix),
            accuracy_level=self.accuracy,
        )

    def store(self, graph: Graph, matrix: Matrix) -> list[str]:
        """Write codes, scales and zero points unless they are in the graph already; return their names."""
        names = [f"{matrix.name}.int{self.bits_of(matrix)}{part}" for part in ("", "_scales", "_zeros")]
        if not graph.known(names[0]):
            packed = matrix.weight if isinstance(matrix.weight, Quantized) else self.quantize(matrix.weight)
            for name, part in zip(names, packed.blocks(self._block(matrix)), strict=True):
                graph.weight(name, part.numpy(), inline=False)
        return [name for name in names if graph.known(name)]

    def gather(self, graph: Graph, ids: str, matrix: Matrix) -> str:
        """Dequantized rows of the matrix: an embedding."""
        codes, scales, zeros = self.store(graph, matrix)
        bits, size, (rows, columns) = self.bits_of(matrix), self._block(matrix), matrix.shape
        padded = -(-columns // size) * size  # the last block is filled up
        flat = graph.alias(f"{matrix.name}.rows", codes, (rows, padded * bits // 8))
        found = graph.contrib(
            "GatherBlockQuantized", (flat, ids, scales, zeros),
            bits=bits, block_size=size, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        ends = (graph.constant([0]), graph.constant([columns]), graph.constant([-1]))
        return found if padded == columns else graph.add("Slice", (found, *ends))

    def rounded(self, matrix: Matrix) -> Tensor:
        if isinstance(matrix.weight, Quantized):
            return matrix.weight.dequantize()
        return self.quantize(matrix.weight).dequantize()

    def bits_of(self, matrix: Matrix) -> int:
        return matrix.weight.block_bits if isinstance(matrix.weight, Quantized) else self.bits

    def _block(self, matrix: Matrix) -> int:
        """Inputs per block of MatMulNBits, 0 if it has no blocks for such groups."""
        group = matrix.group_size if isinstance(matrix.weight, Quantized) else self.group_size
        return block_size(matrix.shape[1] if group < 0 else group, GRAPH_BLOCK)


@dataclass(frozen=True)
class Dynamic:
    """Weights in int8 per output channel, activations in int8 with a scale for every token (MatMulIntegerToFloat).

    ONNX Runtime's DynamicQuantizeMatMul has one scale for all tokens of a call: a token would be computed in another way
    beside others than alone.

    Args:
        largest: largest absolute code: 127, or 63 if AVX2 without VNNI adds products in 16 bits.
    """

    largest: int

    def __call__(self, graph: Graph, x: str, matrix: Matrix) -> str:
        x = _ordered(graph, x, matrix)
        codes, scales = quantize_int8(matrix.dense(), self.largest)
        weight = graph.weight(f"{matrix.name}.dynamic", codes.t().numpy())
        factors = graph.weight(f"{matrix.name}.dynamic_scales", scales.numpy())
        size = graph.add("ReduceMax", (graph.add("Abs", (x,)), graph.constant([-1])), keepdims=1)
        size = graph.add("Max", (size, graph.constant(1e-12, np.float32)))
        step, zero = graph.constant(1 / LARGEST_ACTIVATION, np.float32), graph.constant(128, np.uint8)
        rounded = graph.add("QuantizeLinear", (graph.add("Div", (x, size)), step, zero))
        y = graph.contrib("MatMulIntegerToFloat", (rounded, weight, step, factors, zero))
        y = graph.add("Mul", (y, size))
        return y if matrix.bias is None else graph.add("Add", (y, _bias(graph, matrix, np.float32)))

    def rounded(self, matrix: Matrix) -> Tensor:
        codes, scales = quantize_int8(matrix.dense(), self.largest)
        return codes.float().mul_(scales.view(-1, 1))


def as_dtype(values: Tensor, dtype: type) -> Tensor:
    """fp32 values rounded to `dtype`."""
    return values.half().float() if dtype is np.float16 else values


def rounding(bits: int, group_size: int, cancel: CancelToken) -> Callable[[Tensor], Quantized]:
    """Quantize without calibration: the grid with the least error for 4 bits, symmetric rounding to nearest for 8."""

    def choose(groups: Tensor) -> Choice:
        scale, zero = fit(groups, bits, symmetric=True) if bits == 8 else fit_closely(groups, bits)
        return nearest(groups, scale, zero, bits), scale, zero

    def quantize(weight: Tensor) -> Quantized:
        columns = weight.shape[1]
        if columns % group_size:  # the last group is filled up
            weight = functional.pad(weight, (0, -columns % group_size))
        found = quantize_rows(weight, bits, group_size, choose, cancel)
        return replace(found, codes=found.codes[:, :columns], groups=found.groups[:columns])

    return quantize


def _ordered(graph: Graph, x: str, matrix: Matrix) -> str:
    """Reorder the inputs of an act-order layer by group."""
    if matrix.order is None:
        return x
    return graph.add("Gather", (x, graph.weight(f"{matrix.name}.order", matrix.order.numpy())), axis=-1)


def _bias(graph: Graph, matrix: Matrix, dtype: type) -> str:
    assert matrix.bias is not None  # the caller has looked
    return graph.weight(f"{matrix.name}.bias", matrix.bias.numpy().astype(dtype))
