"""Trace a causal model without its matrices, which are read from the checkpoint when the graph is written.

A matrix is replaced by one number expanded to its shape, which takes no memory. Vectors are real, since the exporter
compares and folds small tensors. `put_weights` makes the matrices of the graph lazy tensors of `onnx_ir`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem.models.checkpoint import Checkpoint
from lowmem.models.matching import match_names, tied_parameters
from lowmem.models.modules import empty_model, set_tensor

Reader = Callable[[], Tensor]

LARGE = 65_536
"""Weights with at least this many elements are replaced while the model is traced."""

PLACEHOLDER = 0.123
"""A number without a rule in the optimizer, unlike 0 and 1."""


class LazyModel:
    """`model` can be traced in `dtype`; `readers` read its matrices, by parameter name.

    Raises:
        CorruptModel, Unsupported: see `match_names`.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.model = empty_model(folder)
        stored = match_names(self.model, checkpoint)
        transposed = _plain_linears(self.model)
        self.readers: dict[str, Reader] = {}
        tied = tied_parameters(self.model)
        for name, source in stored.items():
            read = _reader(checkpoint, source, name in transposed, dtype)
            self._fill(name, read, dtype)
            if name in tied.values():  # a small one too: read lazily, the head is a matrix and no transposed embedding
                self.readers[name] = read
        for name, source in tied.items():
            if name not in stored:
                set_tensor(self.model, name, self.model.get_parameter(source))
                if source in self.readers:  # the exporter may call it by either name
                    self.readers[name] = self.readers[source]

    def _fill(self, name: str, read: Reader, dtype: torch.dtype) -> None:
        owner, _, member = name.rpartition(".")
        module = self.model.get_submodule(owner)
        empty = module._parameters.get(member, module._buffers.get(member))
        shape = torch.Size() if empty is None else empty.shape
        if shape.numel() < LARGE:
            set_tensor(self.model, name, read())
        else:
            self.readers[name] = read
            set_tensor(self.model, name, torch.full((1,), PLACEHOLDER, dtype=dtype).expand(shape))


def _reader(checkpoint: Checkpoint, name: str, transposed: bool, dtype: torch.dtype) -> Reader:
    def read() -> Tensor:
        values = checkpoint.read(name, dtype)
        return values.t().contiguous() if transposed else values

    return read


def _plain_linears(model: nn.Module) -> set[str]:
    """Replace the `Conv1D` layers of GPT-2, whose weights are transposed, by `Linear`; returns the names of the weights."""
    transposed = set()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf, device="meta").requires_grad_(False)
            model.set_submodule(name, linear)
            transposed.add(f"{name}.weight")
    return transposed


def fold_except(names: set[str]) -> Callable[[ir.Node], bool | None]:
    """For the exporter's optimizer: whether to fold a node; never one with an input among `names`."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in names for value in node.inputs) else None

    return should_fold


def put_weights(graph: ir.Graph, readers: dict[str, Reader]) -> None:
    """Make the initializers of `graph` lazy tensors of `readers`; a matrix that is transposed first is stored transposed."""
    for name, read in readers.items():
        value = graph.initializers.get(name)
        if value is None:
            continue
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose" and value.shape is not None and len(value.shape) == 2:
                _put_transposed(graph, node, name, read)
        if value.uses():
            held: Any = value.const_value
            value.const_value = _lazy(name, read, held, held.shape)
        else:
            del graph.initializers[name]


def _put_transposed(graph: ir.Graph, node: ir.Node, name: str, read: Reader) -> None:
    other = f"{name}.transposed"
    found = graph.initializers.get(other)
    if found is None:
        old: Any = graph.initializers[name].const_value
        shape = ir.Shape([old.shape[1], old.shape[0]])
        found = ir.Value(name=other, shape=shape, type=ir.TensorType(old.dtype))
        found.const_value = _lazy(other, lambda: read().t(), old, shape)
        graph.initializers[other] = found
    ir.convenience.replace_all_uses_with(node.outputs[0], found)
    graph.remove(node, safe=True)


def _lazy(name: str, read: Reader, like: Any, shape: Any) -> ir.LazyTensor:
    def tensor() -> ir.Tensor:
        return ir.Tensor(read().contiguous().numpy(), name=name)

    return ir.LazyTensor(tensor, dtype=like.dtype, shape=ir.Shape(shape), name=name, cache=False)
