"""Convert a traced fp32 graph to int8 or int4, one weight at a time.

int8 is dynamic int8 per channel; int4 is block-quantized with an 8-bit output head. Both use `linears.py`, like fused graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, external_data_helper, numpy_helper

from lowmem.events import CancelToken
from lowmem.export.graph import Graph, WeightFile
from lowmem.export.linears import Blocks, Dynamic, Linear, rounding
from lowmem.export.weights import Matrix
from lowmem.kernels.int8_linear import largest_code
from lowmem.planning.exported import HEAD_BITS, HEAD_GROUP
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import DATA


def convert(path: Path, options: ExportOptions, cancel: CancelToken) -> None:
    """Replace the fp32 graph in `path` by one in the precision of `options`."""
    apart = path.with_name("traced")
    apart.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(apart / file.name)
    model = onnx.load(apart / path.name, load_external_data=False)
    with WeightFile(path.with_name(DATA)) as weights:
        graph = Graph(weights)
        _quantize(model, _Weights(model, apart), graph, options, cancel)
        graph.save(path, {"precision": options.precision})
    for file in apart.iterdir():
        file.unlink()
    apart.rmdir()


class _Weights:
    """The initializers of a graph with external data in `folder`, read one at a time."""

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


def _quantize(
    model: onnx.ModelProto, weights: _Weights, graph: Graph, options: ExportOptions, cancel: CancelToken
) -> None:
    chosen = written_layers(options, cancel)
    heads = {"logits"} | {
        name for node in model.graph.node if node.output[0] == "logits" and node.op_type == "Add" for name in node.input
    }
    graph.take_ports(model.graph)
    for node in model.graph.node:
        cancel.check()
        shape = _matrix_shape(node, weights)
        linear = chosen(*shape, node.output[0] in heads) if shape else None
        if linear is not None:
            values = torch.from_numpy(weights.read(node.input[1]).copy()).t().contiguous()
            product = linear(graph, node.input[0], Matrix(node.input[1], values))
            graph.add("Identity", (product,), node.output[0])
        else:
            for name in node.input:
                if name in weights.tensors and not graph.known(name):
                    graph.weight(name, weights.read(name))
            graph.take_node(node)


def written_layers(options: ExportOptions, cancel: CancelToken) -> Callable[[int, int, bool], Linear | None]:
    """How a matrix of so many outputs and inputs, which may be the output head, is computed; None leaves it as it is traced."""
    if options.precision == "int8":
        dynamic = Dynamic(largest_code())
        return lambda _outputs, _inputs, _is_head: dynamic
    size = options.group_size
    block = Blocks(rounding(4, size, cancel), 4, size)
    head = Blocks(rounding(HEAD_BITS, HEAD_GROUP, cancel), HEAD_BITS, HEAD_GROUP)

    # Only the output head is that much wider than its input.
    return lambda outputs, inputs, is_head: head if is_head or outputs > 8 * inputs else block


def _matrix_shape(node: onnx.NodeProto, weights: _Weights) -> tuple[int, int] | None:
    """(outputs, inputs) of a MatMul with a constant fp32 matrix; None for other nodes."""
    tensor = weights.tensors.get(node.input[1]) if node.op_type == "MatMul" else None
    if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return None
    return tensor.dims[1], tensor.dims[0]
