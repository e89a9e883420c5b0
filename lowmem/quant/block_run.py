"""Run one decoder block over the calibration text, stage by stage, while its layers are replaced by quantized ones.

Each stage needs the inputs of some layers as computed by the quantized layers before them. Running the whole block for
each stage would compute attention four times; instead, a branch (attention or MLP) whose last layer has been reached is
replayed from that layer's stored inputs. Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.events import CancelToken
from lowmem.models.blocks import Block, Branch, Stage
from lowmem.models.experts import observed
from lowmem.quant.activations import Activations
from lowmem.quant.hessian import Hessian
from lowmem.quant.skeleton import Call, matrix


class _Reached(Exception):
    """Not an error: ends a forward pass at the layer whose inputs are collected."""


class BlockRun:
    """A block with its weights, and its inputs.

    Args:
        call: how the model calls the block.
        folder: for the inputs of the branches' last layers, which are deleted by `close`.
    """

    def __init__(
        self, block: nn.Module, call: Call, kind: Block, inputs: Activations, folder: Path, cancel: CancelToken
    ) -> None:
        self._block, self._call, self._kind, self._inputs = block, call, kind, inputs
        self._folder, self._cancel = folder, cancel
        self._replayed: dict[Branch, tuple[Activations, list[Tensor]]] = {}
        parameter = next(block.parameters())
        self._device = parameter.device
        self._sample = 0

    @property
    def samples(self) -> int:
        return self._inputs.samples

    def inputs(self, index: int) -> Tensor:
        """The block's inputs for sample `index`."""
        return self._inputs.read(index, self._device)

    def hessian(self, stage: Stage) -> Hessian:
        """An empty Hessian for the stage's inputs."""
        return Hessian(self._width(stage), self._device)

    def accumulate(self, stage: Stage, hessian: Hessian) -> Iterator[int]:
        """Run every sample up to `stage` and add its inputs to `hessian`; yields the index of each sample."""
        branch = next((branch for branch in self._kind.branches if branch.output in stage.linears), None)
        store = self._store(branch, self._width(stage)) if branch else None

        def reached(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hessian.add(inputs[0])
            if store is not None:
                store.write(self._sample, inputs[0])
            raise _Reached

        handle = self._block.get_submodule(stage.linears[0]).register_forward_pre_hook(reached)
        try:
            for index in range(self._inputs.samples):
                with suppress(_Reached):
                    self._forward(index)
                yield index
        finally:
            handle.remove()
        if branch and store:
            self._replayed[branch] = (store, [])
        hessian.finish()

    def accumulate_experts(self, stage: Stage, chosen: dict[int, Hessian], shared: Hessian | None) -> Iterator[int]:
        """Run every sample up to a projection of experts and add the inputs of each of `chosen` to its Hessian.

        Args:
            shared: to which the inputs of all experts are added.
        """
        owner, _, projection = stage.linears[0].rpartition(".")
        experts = self._block.get_submodule(owner)

        def observe(name: str, expert: int, states: Tensor) -> None:
            self._cancel.check()
            if name != projection:
                return
            if expert in chosen:
                chosen[expert].add(states)
            if shared is not None:
                shared.add(states)

        def reached(*_: object) -> None:
            raise _Reached

        handle = experts.register_forward_hook(reached)
        try:
            with observed(experts, observe):
                for index in range(self._inputs.samples):
                    with suppress(_Reached):
                        self._forward(index)
                    yield index
        finally:
            handle.remove()
        for hessian in (*chosen.values(), *((shared,) if shared is not None else ())):
            hessian.finish()

    def _width(self, stage: Stage) -> int:
        return matrix(self._block.get_submodule(stage.linears[0])).shape[1]

    def divide(self, stage: Stage, scales: Tensor) -> None:
        """Divide the stored inputs of a stage by `scales` [in], which its source has absorbed since."""
        for branch, (_, divisors) in self._replayed.items():
            if branch.output in stage.linears:
                divisors.append(scales)

    def finish(self, outputs: Activations) -> Iterator[int]:
        """Write the block's outputs; yields the index of each sample."""
        for index in range(self._inputs.samples):
            outputs.write(index, self._forward(index))
            yield index

    def close(self) -> None:
        for store, _ in self._replayed.values():
            store.close(delete=True)
        self._replayed.clear()

    def _store(self, branch: Branch, width: int) -> Activations:
        return Activations(
            self._folder / f"{branch.module}-inputs.bin", self._inputs.samples, self._inputs.tokens, width
        )

    @torch.no_grad()
    def _forward(self, index: int) -> Tensor:
        self._sample = index
        with ExitStack() as stack:
            for branch, (store, divisors) in self._replayed.items():
                stack.enter_context(self._replaying(branch, store, divisors))
            stack.enter_context(_stoppable(self._block, self._cancel))
            return self.block(self.inputs(index))

    @torch.no_grad()
    def block(self, hidden: Tensor) -> Tensor:
        """What the block makes of hidden states."""
        result = self._block(hidden, *self._call.args, **self._call.kwargs)
        return result if isinstance(result, Tensor) else result[0]

    @contextmanager
    def _replaying(self, branch: Branch, store: Activations, divisors: list[Tensor]) -> Iterator[None]:
        """Within the context, replace the branch by its last layer applied to stored inputs."""
        output: Any = self._block.get_submodule(branch.output)

        def replay(*_: object, **__: object) -> object:
            inputs = store.read(self._sample, self._device)
            for scales in divisors:
                inputs /= scales
            result = output(inputs)
            return result if branch.nones < 0 else (result, *[None] * branch.nones)

        with _forwarding(self._block.get_submodule(branch.module), replay):
            yield


@contextmanager
def _forwarding(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


@contextmanager
def _stoppable(module: nn.Module, cancel: CancelToken) -> Iterator[None]:
    """Within the context, check for Stop before every submodule of `module` runs."""

    def stop(_module: nn.Module, _inputs: tuple[object, ...]) -> None:
        cancel.check()

    handles = [part.register_forward_pre_hook(stop) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
