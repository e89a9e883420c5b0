"""A traced fp32 graph in fewer bits, weight by weight: what is written once is read, rounded and written again.

8 bits are dynamic int8 per channel, 4 bits are blocks with an output head in 8; the same ways as in fused graphs (`linears.py`).
fp16 is ONNX Runtime's own conversion, which sees the graph without its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, external_data_helper, numpy_helper

from lowmem.events import CancelToken
from lowmem.export.graph import Graph, WeightFile
from lowmem.export.linears import Blocks, Dynamic, Linear, rounding
from lowmem.export.manifest import DATA
from lowmem.export.options import ExportOptions
from lowmem.export.weights import Matrix
from lowmem.planning.exported import HEAD_BITS, HEAD_GROUP
from lowmem.quant.int8_linear import largest_code

HALF_RANGE = 6e-8, 65_504.0
"""The smallest and the largest that fp16 holds."""


def convert(path: Path, options: ExportOptions, cancel: CancelToken) -> None:
    """Write the fp32 graph in `path` anew in the precision of `options`, in its place."""
    apart = path.with_name("traced")
    apart.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(apart / file.name)
    model = onnx.load(apart / path.name, load_external_data=False)
    with WeightFile(path.with_name(DATA)) as weights:
        write = _half if options.precision == "fp16" else _quantized
        graph = Graph(weights)
        write(model, _Weights(model, apart), graph, options, cancel)
        graph.save(path, {"precision": options.precision})
    for file in apart.iterdir():
        file.unlink()
    apart.rmdir()


class _Weights:
    """The initializers of a graph whose external data lie in `folder`, read one at a time."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._folder = folder
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(self, name: str) -> np.ndarray:
        tensor = TensorProto()
        tensor.CopyFrom(self.tensors[name])
        if self.is_apart(name):
            external_data_helper.load_external_data_for_tensor(tensor, str(self._folder))
        return numpy_helper.to_array(tensor)

    def is_apart(self, name: str) -> bool:
        return external_data_helper.uses_external_data(self.tensors[name])


def _quantized(
    model: onnx.ModelProto, weights: _Weights, graph: Graph, options: ExportOptions, cancel: CancelToken
) -> None:
    way, head = _ways(options, cancel)
    graph.take_ports(model.graph)
    for node in model.graph.node:
        cancel.check()
        shape = _matrix_shape(node, weights)
        chosen = head if shape and _is_head(node, *shape) else way
        if shape and _divides(chosen, shape[1]):
            values = torch.from_numpy(weights.read(node.input[1]).copy()).t().contiguous()
            product = chosen(graph, node.input[0], Matrix(node.input[1], values))
            graph.add("Identity", (product,), node.output[0])
        else:
            for name in node.input:
                if name in weights.tensors and not graph.known(name):
                    graph.weight(name, weights.read(name))
            graph.take_node(node)


def _ways(options: ExportOptions, cancel: CancelToken) -> tuple[Linear, Linear]:
    """Of the blocks, and of the head."""
    if options.precision == "int8":
        dynamic = Dynamic(largest_code())
        return dynamic, dynamic
    size = options.group_size
    return (
        Blocks(rounding(4, size, cancel), 4, size),
        Blocks(rounding(HEAD_BITS, HEAD_GROUP, cancel), HEAD_BITS, HEAD_GROUP),
    )


def _matrix_shape(node: onnx.NodeProto, weights: _Weights) -> tuple[int, int] | None:
    """(outputs, inputs) of the constant that a node multiplies with; None for other nodes."""
    tensor = weights.tensors.get(node.input[1]) if node.op_type == "MatMul" else None
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    return tensor.dims[1], tensor.dims[0]


def _is_head(node: onnx.NodeProto, outputs: int, inputs: int) -> bool:
    """No other layer is so much wider than its input."""
    return node.output[0] == "logits" or outputs > 8 * inputs


def _divides(way: Linear, inputs: int) -> bool:
    return not isinstance(way, Blocks) or inputs % way.group_size == 0


def _half(
    model: onnx.ModelProto, weights: _Weights, graph: Graph, _options: ExportOptions, cancel: CancelToken
) -> None:
    """Weights are inputs while the graph is converted, and constants again afterwards."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    ports = [value.name for value in (*model.graph.input, *model.graph.output)]
    apart = [name for name in weights.tensors if weights.is_apart(name)]
    near = [tensor for name, tensor in weights.tensors.items() if name not in apart]
    del model.graph.initializer[:]
    model.graph.initializer.extend(near)
    for name in apart:
        tensor = weights.tensors[name]
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    converted = convert_float_to_float16(model, keep_io_types=ports, disable_shape_infer=True)
    types = {value.name: value.type.tensor_type.elem_type for value in converted.graph.input}
    kept = [value for value in converted.graph.input if value.name not in apart]
    del converted.graph.input[:]
    converted.graph.input.extend(kept)
    graph.take_ports(converted.graph)
    for name in apart:
        cancel.check()
        values = weights.read(name)
        graph.weight(name, _as_half(values) if types[name] == TensorProto.FLOAT16 else values)
    for tensor in converted.graph.initializer:
        graph.weight(tensor.name, numpy_helper.to_array(tensor))
    for node in converted.graph.node:
        graph.take_node(node)


def _as_half(values: np.ndarray) -> np.ndarray:
    """Clipped to what fp16 holds."""
    smallest, largest = HALF_RANGE
    tiny = (np.abs(values) < smallest) & (values != 0)
    return np.where(tiny, np.copysign(smallest, values), np.clip(values, -largest, largest)).astype(np.float16)
