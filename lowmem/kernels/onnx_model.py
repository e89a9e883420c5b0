"""An ONNX model of one node, written as protobuf by hand: what ONNX Runtime needs to run a single kernel.

Field numbers are those of onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3). Knows nothing of
kernels; the package `onnx` is not needed. A message is a list of pieces until it is complete, so weights are copied once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_ELEMENT_TYPES = {"float32": 1, "uint8": 2}
_IR_VERSION, _OPSET = 9, 17
_INT_ATTRIBUTE = 2

Pieces = list[bytes | memoryview]


def one_node(op: str, domain: str, attributes: Mapping[str, int], weights: Mapping[str, np.ndarray]) -> bytes:
    """A serialized ModelProto of `y = op(x, *weights)`, x and y being float32 of any shape."""
    node = [*_text(1, "x"), *(piece for name in weights for piece in _text(1, name)), *_text(2, "y"), *_text(4, op)]
    for key, value in attributes.items():
        node += _field(5, [*_text(1, key), *_number(3, value), *_number(20, _INT_ATTRIBUTE)])
    graph = [*_field(1, [*node, *_text(7, domain)]), *_text(2, op)]
    for name, array in weights.items():
        graph += _field(5, _tensor(name, array))
    graph += [*_field(11, _value("x")), *_field(12, _value("y"))]
    model = [*_number(1, _IR_VERSION), *_field(7, graph)]
    for name, version in (("", _OPSET), (domain, 1)):
        model += _field(8, [*_text(1, name), *_number(2, version)])
    return b"".join(model)


def _tensor(name: str, array: np.ndarray) -> Pieces:
    sizes = [piece for size in array.shape for piece in _number(1, size)]
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return [*sizes, *_number(2, _ELEMENT_TYPES[array.dtype.name]), *_text(8, name), *_field(9, [content])]


def _value(name: str) -> Pieces:
    """ValueInfoProto of a float32 tensor."""
    return [*_text(1, name), *_field(2, _field(1, _number(1, _ELEMENT_TYPES["float32"])))]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> Pieces:
    return [_varint(field << 3) + _varint(value)]


def _field(field: int, content: Pieces) -> Pieces:
    return [_varint(field << 3 | 2) + _varint(sum(map(len, content))), *content]


def _text(field: int, content: str) -> Pieces:
    return _field(field, [content.encode()])
