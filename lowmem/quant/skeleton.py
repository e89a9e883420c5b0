"""A model's stored weights by parameter name, read on demand, and what its blocks are called with.

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
from lowmem.messages import msg
from lowmem.models.blocks import Layout
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint
from lowmem.models.matching import match_names
from lowmem.models.modules import set_tensor


class Weights:
    """The stored weights of `model` by its parameter names; tied weights appear once.

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
        return checked_finite(name, self._checkpoint.read(self._stored[name]))

    def read_unquantized(self, name: str) -> Tensor:
        """The tensor as a quantized checkpoint stores it unquantized: fp32 becomes fp16 where its range allows.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        if TORCH_DTYPES[self._checkpoint.tensors[self._stored[name]].dtype] in (torch.float32, torch.float64):
            half = self._checkpoint.read(self._stored[name], torch.float16)
            if all_finite(half):
                return half
        return self.read(name)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; computed from the extremes, without a temporary tensor."""
    return not values.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


def checked_finite(name: str, values: Tensor) -> Tensor:
    """`values`, the tensor `name` of a checkpoint.

    Raises:
        CorruptModel: it holds NaN or infinite values.
    """
    if not all_finite(values):
        raise CorruptModel(
            msg("{name} contains NaN or infinite values.", name=name), msg("Fetch the model again, or choose another.")
        )
    return values


def below(names: Weights, owner: str) -> list[str]:
    """Names of the parameters of the module `owner`."""
    return [name for name in names if name.startswith(f"{owner}.")]


def fill(
    module: nn.Module, owner: str, weights: Weights, exact: Collection[str], device: torch.device
) -> dict[str, torch.dtype]:
    """Load the weights of the module `owner` in fp32: those in `exact` as stored, others rounded as they will be saved.

    Returns:
        The dtypes the others will be saved in, by their names within the module.
    """
    dtypes: dict[str, torch.dtype] = {}
    for name in below(weights, owner):
        local = name.removeprefix(f"{owner}.")
        values = weights.read(name) if local in exact else weights.read_unquantized(name)
        if local not in exact:
            dtypes[local] = values.dtype
        set_tensor(module, local, values.to(device, torch.float32))
    return dtypes


def empty(module: nn.Module) -> None:
    """Free the memory of a module's parameters."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                set_tensor(owner, name, parameter.detach().to("meta"))


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in], a view; GPT-2 stores the transpose."""
    weight: Any = linear.weight
    return oriented(linear, weight.data)


def oriented(linear: nn.Module, weight: Tensor) -> Tensor:
    """`weight` in the orientation that `linear` stores, as [out, in]."""
    return weight.t() if isinstance(linear, Conv1D) else weight


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments the model passes to a block besides the hidden states; the same for all samples of one length."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(nn.Module):
    """Takes the place of a block, records how it is called and passes its input on."""

    def __init__(self, calls: list[Call], last: bool) -> None:
        super().__init__()
        self._calls, self._last = calls, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._calls.append(Call(args, kwargs))
        if self._last:
            raise _Reached(hidden_states)
        return hidden_states


class _Reached(Exception):
    """Not an error: ends a forward pass after the last block."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class Entrance:
    """From token ids to the inputs of the first block, with only those rows of the embeddings in memory that occur."""

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
            values = weights.read_unquantized(f"{name}.weight")
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
        """Free the memory of the embeddings."""
        for module in self._model.modules():
            if isinstance(module, nn.Embedding):
                empty(module)
