"""The original model as the reference of the parity check, with one layer in memory at a time.

Weights are read before a layer runs and released after it, so that a model of any size gives fp32 logits of one batch. They can
be rounded as a graph holds them: then everything by which the graph differs is its own doing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowmem.events import CancelToken
from lowmem.export.convert import written_layers
from lowmem.export.decoder import graphs
from lowmem.export.fused import GraphLayers
from lowmem.export.linears import Dense, Linear, as_dtype
from lowmem.export.weights import Matrix
from lowmem.kernels.packed_linear import read
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.matching import by_module, match_names, tied_parameters
from lowmem.models.modules import empty_model, set_tensor
from lowmem.models.quantization import Quantization
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import GRAPH


@dataclass(frozen=True)
class Rounding:
    """How one graph holds the weights of a model.

    Args:
        linear: of a matrix by its outputs, its inputs and whether it is the output head; None where it is not rounded.
        embedding: of token embeddings, None where they are only cast.
        dtype: of everything else.
    """

    linear: Callable[[int, int, bool], Linear | None]
    embedding: Linear | None = None
    dtype: type = np.float32

    def weight(self, module: nn.Module, name: str, weight: Tensor, is_head: bool) -> Tensor:
        """The weight of a module after rounding, in its own layout."""
        transposed = isinstance(module, Conv1D)
        matrix = Matrix(name, weight.t().contiguous() if transposed else weight)
        if isinstance(module, nn.Embedding):
            chosen = self.embedding
        else:
            chosen = self.linear(*matrix.shape, is_head) if isinstance(module, (nn.Linear, Conv1D)) else None
        if chosen is None:
            return as_dtype(weight, self.dtype)
        rounded = chosen.rounded(matrix)
        return rounded.t() if transposed else rounded


def roundings(kind: str, options: ExportOptions, cancel: CancelToken) -> dict[str, Rounding]:
    """File name -> how the weights of that graph are rounded, for graphs of a `Manifest.kind`."""
    if kind == "fused":
        return {name: _fused(layers) for name, layers in graphs(options, cancel).items()}
    if options.precision in ("fp32", "fp16"):
        dtype = np.float16 if options.precision == "fp16" else np.float32
        return {GRAPH: Rounding(lambda *_: Dense(dtype), dtype=dtype)}
    return {GRAPH: Rounding(written_layers(options, cancel))}


def _fused(layers: GraphLayers) -> Rounding:
    return Rounding(
        lambda _outputs, _inputs, is_head: layers.head if is_head else layers.block, layers.embedding, layers.dtype
    )


def streamed_model(
    folder: Path, checkpoint: Checkpoint, stored: Quantization | None, rounding: Rounding | None = None
) -> Any:
    """The model of `folder`, computing in fp32 on the CPU; packed layers are dequantized exactly.

    Args:
        rounding: how a graph holds the weights; None takes them as they are stored.

    Raises:
        CorruptModel, Unsupported: see `match_names`.
    """
    model = empty_model(folder)
    names = match_names(model, checkpoint)
    for parameter, source in tied_parameters(model).items():
        if parameter not in names and source in names:
            names[parameter] = names[source]
    head = model.get_output_embeddings()
    for owner, members in by_module(names).items():
        module = model.get_submodule(owner)
        if "qweight" in members and stored is not None:
            model.set_submodule(owner, _PackedLayer(checkpoint, owner, members, stored, rounding))
        else:
            _stream(module, owner, checkpoint, members, rounding, module is head)
    return model


def _stream(
    module: nn.Module,
    owner: str,
    checkpoint: Checkpoint,
    members: Mapping[str, str],
    rounding: Rounding | None,
    is_head: bool,
) -> None:
    empty = {member: getattr(module, member) for member in members}

    def load(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for member, name in members.items():
            values = checkpoint.read(name, torch.float32)
            if rounding is not None and isinstance(module, nn.Embedding):
                rows = inputs[0].unique()  # the others are not looked up
                values[rows] = rounding.weight(module, owner, values[rows], is_head)
            elif rounding is not None and member == "weight":
                values = rounding.weight(module, owner, values, is_head)
            elif rounding is not None:
                values = as_dtype(values, rounding.dtype)
            set_tensor(module, member, values)

    def release(_module: nn.Module, _inputs: object, _output: object) -> None:
        for member, tensor in empty.items():
            set_tensor(module, member, tensor)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(release)


class _PackedLayer(nn.Module):
    """A layer of a GPTQ or AWQ checkpoint that is read and dequantized for each pass."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        members: Mapping[str, str],
        stored: Quantization,
        rounding: Rounding | None,
    ) -> None:
        super().__init__()
        self._arguments = checkpoint, name, dict(members), stored
        self._rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        checkpoint, name, members, stored = self._arguments
        parts = {part: checkpoint.read(stored_name) for part, stored_name in members.items()}
        bias = parts.pop("bias", None)
        matrix = Matrix(name, read(stored, name, parts))
        linear = self._rounding.linear(*matrix.shape, False) if self._rounding else None
        weight = linear.rounded(matrix) if linear else matrix.dense()
        return functional.linear(x, weight, None if bias is None else bias.float())
