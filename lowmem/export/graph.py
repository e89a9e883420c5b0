"""Build an ONNX graph whose weights are streamed to one file of external data.

Protobuf messages are made by `onnx.helper`; only the weight file is written here, because `onnx.save` and `onnx_ir.save`
need all weights of a graph at the same time, or a callback for each. `WeightFile` writes a weight at once and keeps its
place only, so that a graph of any size takes the memory of its largest weight, and several graphs can share weights.

External data: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lowmem.errors import DiskFull
from lowmem.messages import msg

OPSET = 21
IR_VERSION = 10
"""Supported by onnxruntime 1.18 and later."""

CONTRIB = "com.microsoft"

ALIGNMENT = 4096
"""Weights start on a page, so that a runtime can map them instead of copying."""

INLINE_BYTES = 1024
"""Smaller constants are stored in the graph, where shape inference can use them."""

Dims = tuple[int | str, ...]


class WeightFile:
    """The external data of the graphs in a folder. Each name is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._entries: dict[str, onnx.TensorProto] = {}

    def add(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """Write `array` and return a tensor that refers to it."""
        if name in self._entries:
            return self._entries[name]
        array = np.ascontiguousarray(array)
        self._file.seek(-self._file.tell() % ALIGNMENT, 1)
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": self.path.name, "offset": self._file.tell(), "length": array.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._write(array)
        self._entries[name] = tensor
        return tensor

    def get(self, name: str) -> onnx.TensorProto | None:
        return self._entries.get(name)

    def alias(self, name: str, written: str, dims: Dims) -> onnx.TensorProto:
        """Another name and shape for the bytes of the weight `written`."""
        tensor = TensorProto()
        tensor.CopyFrom(self._entries[written])
        tensor.name, tensor.dims[:] = name, dims
        return self._entries.setdefault(name, tensor)

    def _write(self, array: np.ndarray) -> None:
        try:
            self._file.write(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull(
                msg("The disk is full after {written:,} bytes of weights.", written=self._file.tell()),
                msg("Free some space, or choose fewer bits."),
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Graph:
    """A graph under construction. Nodes are added in the order of computation; values are referred to by name."""

    def __init__(self, weights: WeightFile) -> None:
        self.weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._between: list[onnx.ValueInfoProto] = []
        self._names: dict[str, int] = {}

    def input(self, name: str, dtype: type, dims: Dims) -> str:
        self._inputs.append(_value(name, dtype, dims))
        return name

    def optional_input(self, name: str, default: np.ndarray) -> str:
        """An optional input: an initializer that a caller can override."""
        self._initializers[name] = numpy_helper.from_array(default, name)
        return self.input(name, default.dtype.type, default.shape)

    def output(self, name: str, dtype: type, dims: Dims) -> None:
        self._outputs.append(_value(name, dtype, dims))

    def weight(self, name: str, array: np.ndarray, inline: bool = True) -> str:
        """A named constant; written to the weight file if it is large or not `inline`."""
        if name not in self._initializers:
            small = inline and array.nbytes <= INLINE_BYTES and self.weights.get(name) is None
            self._initializers[name] = numpy_helper.from_array(array, name) if small else self.weights.add(name, array)
        return name

    def known(self, name: str) -> bool:
        """Whether the weight exists, in this graph or in another graph of the folder, which then shares it."""
        if name not in self._initializers and (entry := self.weights.get(name)) is not None:
            self._initializers[name] = entry
        return name in self._initializers

    def alias(self, name: str, written: str, dims: Dims) -> str:
        """See `WeightFile.alias`."""
        self._initializers[name] = self.weights.alias(name, written, dims)
        return name

    def constant(self, value: Any, dtype: type = np.int64) -> str:
        """A small constant, named after its value."""
        array: np.ndarray = np.asarray(value, dtype)
        return self.weight(
            f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.flat))}", array
        )

    def add(
        self,
        op: str,
        inputs: Iterable[str],
        outputs: str | tuple[str, ...] = "",
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node; returns its first output, named after the operator by default."""
        count = self._names[op] = self._names.get(op, -1) + 1
        names = (outputs,) if isinstance(outputs, str) else outputs
        names = (names[0] or f"{op}_{count}", *names[1:])
        self._nodes.append(
            helper.make_node(op, list(inputs), list(names), f"{op}_{count}", domain=domain, **attributes)
        )
        return names[0]

    def take_ports(self, other: onnx.GraphProto) -> None:
        """Copy the inputs, outputs and value types of `other`."""
        self._inputs, self._outputs, self._between = [*other.input], [*other.output], [*other.value_info]

    def take_node(self, node: onnx.NodeProto) -> None:
        """Append a node of another graph unchanged."""
        self._nodes.append(node)

    def contrib(self, op: str, inputs: Iterable[str], outputs: str | tuple[str, ...] = "", **attributes: Any) -> str:
        """Append a node with an operator of ONNX Runtime (com.microsoft)."""
        return self.add(op, inputs, outputs, CONTRIB, **attributes)

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the graph, without the weights, which are in the weight file already."""
        constants = [*self._initializers.values()]
        graph = helper.make_graph(
            self._nodes, path.stem, self._inputs, self._outputs, constants, value_info=self._between
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="lowmem")
        helper.set_model_props(model, dict(metadata))
        path.write_bytes(model.SerializeToString())


def _value(name: str, dtype: type, dims: Dims) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dims)
