"""An ONNX model of one node, written as protobuf by hand: what ONNX Runtime needs to run a single kernel.

Field numbers are those of onnx.proto3 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3). Knows nothing of
kernels; the package `onnx` is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_ELEMENT_TYPES = {"float32": 1, "uint8": 2}
_IR_VERSION, _OPSET = 9, 17
_INT_ATTRIBUTE = 2


def one_node(op: str, domain: str, attributes: Mapping[str, int], weights: Mapping[str, np.ndarray]) -> bytes:
    """A serialized ModelProto of `y = op(x, *weights)`, x and y being float32 of any shape."""
    node = _text(1, "x") + b"".join(_text(1, name) for name in weights) + _text(2, "y") + _text(4, op)
    node += b"".join(
        _field(5, _text(1, key) + _number(3, value) + _number(20, _INT_ATTRIBUTE)) for key, value in attributes.items()
    )
    graph = _field(1, node + _text(7, domain)) + _text(2, op)
    graph += b"".join(_field(5, _tensor(name, array)) for name, array in weights.items())
    graph += _field(11, _value("x")) + _field(12, _value("y"))
    opsets = b"".join(_field(8, _text(1, name) + _number(2, version)) for name, version in (("", _OPSET), (domain, 1)))
    return _number(1, _IR_VERSION) + _field(7, graph) + opsets


def _tensor(name: str, array: np.ndarray) -> bytes:
    sizes = b"".join(_number(1, size) for size in array.shape)
    return sizes + _number(2, _ELEMENT_TYPES[array.dtype.name]) + _text(8, name) + _field(9, array.tobytes())


def _value(name: str) -> bytes:
    """ValueInfoProto of a float32 tensor."""
    return _text(1, name) + _field(2, _field(1, _number(1, _ELEMENT_TYPES["float32"])))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _field(field, content.encode())
