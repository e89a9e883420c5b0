"""A model's weights by its own names, read when they are needed, and its blocks run one by one.

Knows transformers' models and safetensors names; knows nothing of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem.errors import CorruptModel
from lowmem.models.blocks import Layout
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint
from lowmem.models.matching import match_names
from lowmem.models.modules import set_tensor


class Weights:
    """The stored weights of `model` under its own parameter names; tied ones appear once.

    Raises:
        CorruptModel: one is missing or has another shape.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stored = match_names(model, checkpoint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def elements(self, name: str) -> int:
        return math.prod(self._checkpoint.tensors[self._stored[name]].shape)

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        values = self._checkpoint.read(self._stored[name])
        if not all_finite(values):
            raise CorruptModel(f"{name} holds NaN or infinite values.", "Fetch the model again, or choose another.")
        return values

    def read_kept(self, name: str) -> Tensor:
        """The tensor as a quantized checkpoint keeps it: fp32 becomes fp16 where its range allows.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        if TORCH_DTYPES[self._checkpoint.tensors[self._stored[name]].dtype] in (torch.float32, torch.float64):
            half = self._checkpoint.read(self._stored[name], torch.float16)
            if all_finite(half):
                return half
        return self.read(name)


def all_finite(values: Tensor) -> bool:
    """Neither NaN nor infinite, told from the extremes, which takes no memory."""
    return not values.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


def below(names: Weights, owner: str) -> list[str]:
    """Names of the parameters of the module `owner`."""
    return [name for name in names if name.startswith(f"{owner}.")]


def fill(
    module: nn.Module, owner: str, weights: Weights, exact: Collection[str], device: torch.device
) -> dict[str, torch.dtype]:
    """Give the module called `owner` its weights in fp32: those in `exact` as they are, others as they will be kept.

    Returns:
        the dtypes in which the others are kept, by their names within the module.
    """
    dtypes: dict[str, torch.dtype] = {}
    for name in below(weights, owner):
        local = name.removeprefix(f"{owner}.")
        values = weights.read(name) if local in exact else weights.read_kept(name)
        if local not in exact:
            dtypes[local] = values.dtype
        set_tensor(module, local, values.to(device, torch.float32))
    return dtypes


def empty(module: nn.Module) -> None:
    """Give a module's memory back."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                set_tensor(owner, name, parameter.detach().to("meta"))


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], sharing its memory; GPT-2's lie the other way round."""
    weight: Any = linear.weight
    return oriented(linear, weight.data)


def oriented(linear: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, stored as `linear` stores it, as [out, in]."""
    return weight.t() if isinstance(linear, Conv1D) else weight


@dataclass(frozen=True, slots=True)
class Call:
    """What the model passes to one block beside the hidden states: the same for all samples of one length."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Stands in a block's place, notes how it is called and hands its input on."""

    def __init__(self, calls: list[Call], last: bool) -> None:
        super().__init__()
        self._calls, self._last = calls, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(Call(args, kwargs))
        if self._last:
            raise _Reached(hidden_states)
        return hidden_states


class _Reached(Exception):
    """Not an error: the end of what is wanted of a forward pass."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class Entrance:
    """What happens before the first block: from token ids to hidden states, with only the embeddings' rows that occur."""

    def __init__(self, model: Any, layout: Layout, weights: Weights, samples: Sequence[Sequence[int]]) -> None:
        self._decoder = model.base_model
        self._ids, compact = torch.unique(torch.tensor(samples), return_inverse=True)
        self._samples = compact
        self._parent, _, self._list = layout.path.rpartition(".")
        self._blocks = model.get_submodule(layout.path)
        self._model = model
        self._fill(model, layout, weights)

    def _fill(self, model: Any, layout: Layout, weights: Weights) -> None:
        tokens = model.get_input_embeddings()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Embedding) or name.startswith(f"{layout.path}."):
                continue
            values = weights.read_kept(f"{name}.weight")
            if module is tokens:
                values = values[self._ids]
                module.padding_idx = None
            module.weight = nn.Parameter(values.float(), requires_grad=False)

    def calls(self) -> list[Call]:
        """How each block is called, for samples of this length."""
        calls: list[Call] = []
        self._run(0, calls)
        return calls

    def hidden_states(self, index: int) -> Tensor:
        """Inputs of the first block for sample `index`: fp32 [1, tokens, hidden]."""
        return self._run(index, [])

    def _run(self, index: int, calls: list[Call]) -> Tensor:
        count = len(self._blocks)
        recorders = nn.ModuleList(_Recorder(calls, number == count - 1) for number in range(count))
        parent = self._model.get_submodule(self._parent)
        setattr(parent, self._list, recorders)
        try:
            with torch.no_grad():
                self._decoder(input_ids=self._samples[index : index + 1], use_cache=False)
        except _Reached as reached:
            return reached.hidden_states.detach()
        finally:
            setattr(parent, self._list, self._blocks)
        raise RuntimeError("the model did not call its last block")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the embeddings' memory back."""
        for module in self._model.modules():
            if isinstance(module, nn.Embedding):
                empty(module)
