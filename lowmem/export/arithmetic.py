"""A graph with its codes multiplied out in fp32, so that nothing but its weights and its structure is compared.

Graphs in int8 and int4 round activations too while they compute. That noise is larger than what a damaged layer does to the
logits of a deep model, so the parity check needs the graph without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper

from lowmem.runtime.onnx.model import open_session

IN_FP32 = 1
"""The accuracy level of MatMulNBits that dequantizes codes and keeps activations in fp32."""


def open_in_fp32(path: Path, **arguments: Any) -> Any:
    """`open_session` of the graph in `path`, computing with dequantized weights and fp32 activations.

    Raises:
        CorruptModel, Unsupported, OutOfMemory: see `open_session`.
    """
    model = onnx.load(path, load_external_data=False)
    nodes = [new for node in model.graph.node for new in _in_fp32(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    twin = path.with_name(f"fp32-{path.name}")  # external data is looked for beside the graph
    twin.write_bytes(model.SerializeToString())
    try:
        # Folded or packed, the dequantized weights of all layers would be in memory at once.
        return open_session(twin, frugal=True, **arguments)
    finally:
        twin.unlink()


def _in_fp32(node: NodeProto) -> list[NodeProto]:
    if node.op_type == "MatMulNBits":
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("accuracy_level", IN_FP32)])
    if node.op_type == "QuantizeLinear":  # whose result only MatMulIntegerToFloat takes
        return [helper.make_node("Identity", node.input[:1], node.output)]
    if node.op_type != "MatMulIntegerToFloat":
        return [node]
    x, codes, _, scales, _ = node.input
    inputs, rest, shape, shaped, weight, product = (f"{node.name}.{n}" for n in ("in", "out", "to", "codes", "w", "y"))
    return [
        # In a shape that is known once x is: nothing else makes ONNX Runtime wait with dequantizing until a layer's turn.
        helper.make_node("Shape", [x], [inputs], start=-1),
        helper.make_node("Constant", [], [rest], value_ints=[-1]),
        helper.make_node("Concat", [inputs, rest], [shape], axis=0),
        helper.make_node("Reshape", [codes, shape], [shaped]),
        helper.make_node("Cast", [shaped], [weight], to=TensorProto.FLOAT),
        helper.make_node("MatMul", [x, weight], [product]),
        helper.make_node("Mul", [product, scales], list(node.output)),
    ]
