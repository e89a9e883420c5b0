"""A model's stored weights by parameter name, read on demand, and what its blocks are called with.

Knows transformers' models and safetensors names; knows nothing of quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem.errors import CorruptModel, Unsupported
from lowmem.messages import msg
from lowmem.models.blocks import BlockList
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint, Entry
from lowmem.models.conversions import Conversions
from lowmem.models.matching import by_module, match_names
from lowmem.models.modules import set_tensor
from lowmem.models.tensors import CONVERSION_BYTES
from lowmem.models.tensors import Tensor as Inventoried


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that is quantized: a linear layer's, or (a part of) that of one expert of a stacked projection.

    Args:
        layer: the name its codes are stored under, without a suffix.
        parameter: that it is part of.
        expert: -1 for a linear layer.
        part, parts: its place among equal parts of the expert's rows, such as gate and up.
    """

    layer: str
    parameter: str
    expert: int = -1
    part: int = 0
    parts: int = 1

    def view(self, weight: Tensor, transposed: bool) -> Tensor:
        """This matrix [out, in] within its parameter, sharing memory."""
        whole = weight if self.expert < 0 else weight[self.expert]
        whole = whole.t() if transposed else whole
        return whole.chunk(self.parts)[self.part]


class Weights:
    """The stored weights of `model` by its parameter names; tied weights appear once.

    Args:
        inventory: the tensors as the model holds them, of a `ModelSpec`.

    Raises:
        CorruptModel: one is missing or has another shape.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, inventory: Iterable[Inventoried]) -> None:
        self._checkpoint = checkpoint
        self._inventory = {tensor.name: tensor for tensor in inventory}
        self._sources = {target.name: target for target in Conversions(model).targets(checkpoint.tensors)}
        self._stored = match_names(model, checkpoint)
        self._last: tuple[str, Tensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def elements(self, name: str) -> int:
        return math.prod(self._checkpoint.tensors[self._stored[name]].shape)

    def output_name(self, name: str) -> str:
        """What a parameter is called in the result: as in the original, if it is one tensor there."""
        source = self._sources[name]
        return source.stored[0] if source.make is None else name

    def transposed(self, name: str) -> bool:
        return self._inventory[name].transposed

    def matrices(self, name: str) -> list[Matrix]:
        """The matrices of a linear layer or of all experts; experts that are stored apart keep their names."""
        tensor = self._inventory[name]
        if tensor.role != "experts":
            return [Matrix(self.output_name(name).removesuffix(".weight"), name)]
        experts, parts = tensor.shape[0], tensor.parts
        stored = self._sources[name].stored
        apart = len(stored) == experts * parts > 1
        return [
            Matrix(stored[e * parts + part].removesuffix(".weight") if apart else f"{name}.{e}", name, e, part, parts)
            for e in range(experts)
            for part in range(parts)
        ]

    def read_matrix(self, matrix: Matrix) -> Tensor:
        """The matrix [out, in] in its stored dtype.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        transposed = self.transposed(matrix.parameter)
        if matrix.expert < 0:
            return matrix.view(self.read(matrix.parameter), transposed)
        entry = self._checkpoint.tensors[self._stored[matrix.parameter]]
        if not isinstance(entry, Entry):
            return matrix.view(self._whole(matrix.parameter), transposed)
        count = entry.shape[0] * matrix.parts
        rows = Entry(entry.dtype, (count, entry.shape[1] // matrix.parts, *entry.shape[2:]), entry.extents)
        number = matrix.expert * matrix.parts + matrix.part
        found = self._checkpoint.read_entry(rows.rows(number, number + 1))[0]
        found = checked_finite(matrix.layer, found)
        return found.t() if transposed else found

    def _whole(self, name: str) -> Tensor:
        """A tensor that is computed from stored ones; the last is kept for the next expert."""
        last = self._last
        if last is None or last[0] != name:
            last = self._last = (name, self.read(name))
        return last[1]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        return checked_finite(name, self._checkpoint.read(self._stored[name]))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inventory[name].shape

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a matrix in its stored dtype, from `start` (inclusive) to `stop` (exclusive).

        Raises:
            CorruptModel: they hold NaN or infinite values.
        """
        entry = self._checkpoint.tensors[self._stored[name]]
        return checked_finite(name, self._checkpoint.read_entry(entry.rows(start, stop)))

    def read_chosen_rows(self, name: str, ids: Tensor) -> Tensor:
        """The rows `ids` (in ascending order) of a large matrix, of which only some rows are in memory at a time."""
        rows, columns = self.shape(name)
        step = max(1, CONVERSION_BYTES // (4 * columns))
        parts = []
        for start in range(0, rows, step):
            here = ids[(ids >= start) & (ids < start + step)] - start
            if len(here):
                parts.append(self.read_rows(name, start, min(start + step, rows))[here])
        return torch.cat(parts)

    def read_unquantized(self, name: str) -> Tensor:
        """The tensor as a quantized checkpoint stores it unquantized: fp32 becomes fp16 where its range allows.

        What the family's code computes in fp32 stays as it is.

        Raises:
            CorruptModel: it holds NaN or infinite values.
        """
        stored = TORCH_DTYPES[self._checkpoint.tensors[self._stored[name]].dtype]
        if stored in (torch.float32, torch.float64) and not self._inventory[name].wide:
            half = self._checkpoint.read(self._stored[name], torch.float16)
            if all_finite(half):
                return half
        return self.read(name)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; computed from the extremes, without a temporary tensor."""
    return (
        not values.numel()
        or not values.is_floating_point()
        or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))
    )


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

    Args:
        exact: names of parameters of the model.

    Returns:
        The dtypes the others will be saved in, by their names within the module.
    """
    dtypes: dict[str, torch.dtype] = {}
    for name in below(weights, owner):
        local = name.removeprefix(f"{owner}.")
        values = weights.read(name) if name in exact else weights.read_unquantized(name)
        if name not in exact:
            dtypes[local] = values.dtype
        set_tensor(module, local, values.to(device, torch.float32 if values.is_floating_point() else None))
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
    """Takes the place of a block, records how it is called and passes its input on; looks like the block otherwise."""

    def __init__(self, block: nn.Module, nones: int, calls: list[Call], last: bool) -> None:
        super().__init__()
        vars(self).update(block=block, nones=nones, calls=calls, last=last)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        hidden_states, *more = args or (kwargs.pop("hidden_states"),)
        own["calls"].append(Call(tuple(more), kwargs))
        if own["last"]:
            raise _Reached(hidden_states)
        return hidden_states if own["nones"] < 0 else (hidden_states, *[None] * own["nones"])


class _Reached(Exception):
    """Not an error: ends a forward pass after the last block."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states


class Entrance:
    """From token ids to the inputs of the first block, with only those rows of the embeddings in memory that occur."""

    def __init__(
        self,
        model: Any,
        blocks: BlockList,
        weights: Weights,
        samples: Sequence[Sequence[int]],
        embedded: Callable[[Weights, str, Tensor], Tensor] = lambda weights, name, ids: weights.read_unquantized(name)[
            ids
        ],
    ) -> None:
        """`embedded` returns the rows `ids` of the embedding `name` as the result will hold them."""
        self._embedded = embedded
        self._decoder = model.base_model
        self._ids, compact = torch.unique(torch.tensor(samples), return_inverse=True)
        self._samples = compact
        self._parent, _, self._list = blocks.path.rpartition(".")
        self._kinds, self._blocks = blocks, model.get_submodule(blocks.path)
        self._model = model
        self._filled = list(self._fill(model, blocks, weights))

    def _fill(self, model: Any, blocks: BlockList, weights: Weights) -> Iterator[nn.Module]:
        """Load what lies outside the blocks, the output head excepted; yields the modules."""
        tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
        for owner, members in by_module({name: name for name in weights}).items():
            module = model.get_submodule(owner)
            if owner.startswith(f"{blocks.path}.") or module is head:
                continue
            yield module
            for member, name in members.items():
                if module is tokens and member == "weight":
                    values = self._embedded(weights, name, self._ids)
                    module.padding_idx = None
                else:
                    values = weights.read_unquantized(name)
                set_tensor(module, member, values.float() if values.is_floating_point() else values)

    def check_calls(self) -> None:
        """Check that blocks are called in the same way for every text.

        Raises:
            Unsupported: they are not.
        """
        first, second = self.calls(), self.calls(min(1, len(self._samples) - 1))
        if not all(map(_equal, first, second)):
            raise Unsupported(
                msg(
                    "The blocks of {model_type} models read more than hidden states.",
                    model_type=self._model.config.model_type,
                ),
                msg("Choose a method without calibration, such as HQQ."),
            )

    def calls(self, index: int = 0) -> list[Call]:
        """How each block is called, for samples of this length."""
        calls: list[Call] = []
        self._run(index, calls)
        return calls

    def hidden_states(self, index: int) -> Tensor:
        """Inputs of the first block for sample `index`: fp32 [1, tokens, hidden]."""
        return self._run(index, [])

    def _run(self, index: int, calls: list[Call]) -> Tensor:
        count = len(self._blocks)
        recorders = nn.ModuleList(
            _Recorder(block, self._kinds[number].nones, calls, number == count - 1)
            for number, block in enumerate(self._blocks)
        )
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
        """Free the memory of what was loaded."""
        for module in self._filled:
            empty(module)


def _equal(first: Any, second: Any) -> bool:
    """Whether two calls, or arguments of them, are the same."""
    if isinstance(first, Call):
        return _equal((first.args, first.kwargs), (second.args, second.kwargs))
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return True
