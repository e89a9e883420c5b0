"""The original model as the reference of the parity check, with one layer in memory at a time.

Weights are read before a layer runs and released after it, so that a model of any size gives fp32 logits of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lowmem.kernels.packed_linear import read
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.matching import by_module, match_names, tied_parameters
from lowmem.models.modules import empty_model, set_tensor
from lowmem.models.quantization import Quantization


def streamed_model(folder: Path, checkpoint: Checkpoint, stored: Quantization | None) -> Any:
    """The model of `folder`, computing in fp32 on the CPU; packed layers are dequantized exactly.

    Raises:
        CorruptModel, Unsupported: see `match_names`.
    """
    model = empty_model(folder)
    names = match_names(model, checkpoint)
    for parameter, source in tied_parameters(model).items():
        if parameter not in names and source in names:
            names[parameter] = names[source]
    for owner, members in by_module(names).items():
        module = model.get_submodule(owner)
        if "qweight" in members and stored is not None:
            model.set_submodule(owner, _PackedLayer(checkpoint, owner, members, stored, isinstance(module, Conv1D)))
        else:
            _stream(module, checkpoint, members)
    return model


def _stream(module: nn.Module, checkpoint: Checkpoint, members: Mapping[str, str]) -> None:
    empty = {member: getattr(module, member) for member in members}

    def load(_module: nn.Module, _inputs: object) -> None:
        for member, name in members.items():
            set_tensor(module, member, checkpoint.read(name, torch.float32))

    def release(_module: nn.Module, _inputs: object, _output: object) -> None:
        for member, tensor in empty.items():
            set_tensor(module, member, tensor)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(release)


class _PackedLayer(nn.Module):
    """A layer of a GPTQ or AWQ checkpoint that is read and dequantized for each pass."""

    def __init__(
        self, checkpoint: Checkpoint, name: str, members: Mapping[str, str], stored: Quantization, transposed: bool
    ) -> None:
        super().__init__()
        self._arguments = checkpoint, name, dict(members), stored
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        checkpoint, name, members, stored = self._arguments
        parts = {part: checkpoint.read(stored_name) for part, stored_name in members.items()}
        bias = parts.pop("bias", None)
        return functional.linear(x, read(stored, name, parts).dequantize(), None if bias is None else bias.float())
