"""Derives the `BlockList` of a model from one pass without weights: who reads which tensor, in which order.

Linear layers that read the very same tensor form a stage. A module that returns the very tensor that a linear layer made
is a branch, which can be replayed from that layer's inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.models.blocks import Block, BlockList, Branch, Stage
from lowmem.models.experts import observed

Key = tuple[int, int, tuple[int, ...]]


def derive_blocks(model: PreTrainedModel, path: str, run: Callable[[], object]) -> BlockList:
    """The blocks of `model`, which has them in the module list `path`; `run` passes some tokens through it."""
    blocks: Any = dict(model.named_modules()).get(path)
    if blocks is None:
        return BlockList()
    traces = [_Trace(block) for block in blocks]
    with ExitStack() as stack:
        for trace in traces:
            stack.enter_context(trace.following())
        try:
            run()
        except Exception:
            return BlockList(path, (Block(),), (0,) * len(blocks), "unknown")
    found = [trace.block() for trace in traces]
    kinds = list(dict.fromkeys(found))
    return BlockList(path, tuple(kinds), tuple(map(kinds.index, found)), _not_apart(blocks, traces))


def _not_apart(blocks: Any, traces: list[_Trace]) -> str:
    owners = Counter(id(parameter) for block in blocks for parameter in {*block.parameters()})
    if any(count > 1 for count in owners.values()):
        return "shared"
    if any(len(trace.calls) != 1 for trace in traces):
        return "inputs"
    calls = [trace.calls[0] for trace in traces]
    if any(before.output is not after.hidden for before, after in pairwise(calls)):
        return "inputs"
    if any(call.hidden is None or call.hidden.dim() != 3 for call in calls):
        return "inputs"
    made = {id(value) for call in calls for value in call.more}
    if any(id(value) in made for call in calls for value in call.others):
        return "inputs"
    if any(isinstance(value, (dict, list)) for call in calls for value in call.others):
        return "states"
    return ""


class _Call:
    """One call of a block.

    Attributes:
        hidden: the hidden states that it is given.
        others: its other arguments.
        output: the hidden states that it returns; nones: see `Branch`.
        more: other tensors that it returns.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        first, *more = args or (rest.pop("hidden_states", None),)
        self.hidden: Tensor | None = first if isinstance(first, Tensor) else None
        self.others = [*more, *rest.values()]
        self.output: Tensor | None = None
        self.nones = -1
        self.more: list[Tensor] = []

    def returned(self, result: Any) -> None:
        self.output, self.nones, _ = _parts(result)
        if isinstance(result, tuple):
            self.more = [value for value in result[1:] if isinstance(value, Tensor)]


def _parts(result: Any) -> tuple[Tensor | None, int, bool]:
    """(The first value if it is a tensor, number of other values or -1 for a bare tensor, whether all those are None)."""
    if isinstance(result, Tensor):
        return result, -1, True
    if isinstance(result, tuple) and result and isinstance(result[0], Tensor):
        return result[0], len(result) - 1, all(value is None for value in result[1:])
    return None, -1, False


class _Trace:
    """What happens in one block during a pass."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self.calls: list[_Call] = []
        self._stages: dict[Key | str, list[str]] = {}
        self._outputs: dict[int, str] = {}
        self._branches: dict[str, tuple[str, int]] = {}
        self._alive: list[Tensor] = []
        """Every tensor seen, so that no other takes its place in memory."""

    def block(self) -> Block:
        outermost = [name for name in self._branches if not self._inside(name)]
        branches = (Branch(name, *self._branches[name]) for name in outermost)
        stages = tuple(Stage(tuple(names)) for names in self._stages.values())
        alone = {stage.linears[0] for stage in stages if len(stage.linears) == 1}
        kept = tuple(branch for branch in branches if branch.output in alone)
        return Block(stages, kept, self.calls[0].nones if self.calls else -1)

    def _inside(self, name: str) -> bool:
        return any(name.startswith(f"{other}.") for other in self._branches if other)

    @contextmanager
    def following(self) -> Iterator[None]:
        handles = [
            self._block.register_forward_pre_hook(self._called, with_kwargs=True),
            self._block.register_forward_hook(self._returned),
        ]
        with ExitStack() as stack:
            for name, module in self._block.named_modules():
                if isinstance(module, (nn.Linear, Conv1D)):
                    handles += self._linear(name, module)
                elif name:
                    handles.append(module.register_forward_hook(self._branch(name)))
                if hasattr(module, "is_transposed"):
                    stack.enter_context(observed(module, self._experts(name)))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _called(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(_Call(args, kwargs))

    def _returned(self, _: nn.Module, __: Any, result: Any) -> None:
        self.calls[-1].returned(result)

    def _linear(self, name: str, module: nn.Module) -> list[Any]:
        def reads(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._read(_key(inputs[0]), name, inputs[0])

        def wrote(_: nn.Module, __: Any, output: Tensor) -> None:
            self._outputs[id(output)] = name
            self._alive.append(output)

        return [module.register_forward_pre_hook(reads), module.register_forward_hook(wrote)]

    def _read(self, key: Key | str, name: str, tensor: Tensor) -> None:
        self._alive.append(tensor)
        if all(name not in names for names in self._stages.values()):
            self._stages.setdefault(key, []).append(name)

    def _experts(self, owner: str) -> Any:
        def reads(projection: str, _expert: int, states: Tensor) -> None:
            name = f"{owner}.{projection}"
            self._read(name, name, states)

        return reads

    def _branch(self, name: str) -> Any:
        def returned(_: nn.Module, __: Any, result: Any) -> None:
            tensor, nones, alone = _parts(result)
            output = self._outputs.get(id(tensor))
            if alone and output and output.startswith(f"{name}."):
                self._branches[name] = (output, nones)

        return returned


def _key(tensor: Tensor) -> Key:
    """Equal for views of the same elements as rows of the same width."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), (tensor.numel(), tensor.shape[-1])
