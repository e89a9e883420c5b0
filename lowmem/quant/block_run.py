"""One decoder block, run over the calibration text stage by stage while its layers become quantized ones.

Each stage wants the inputs of some layers as they are once all layers before are quantized. Running
the block anew for each would compute attention four times; here a branch whose last layer has been
reached is replayed from that layer's stored inputs. Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.events import CancelToken
from lowmem.models.blocks import Branch, Layout, Stage
from lowmem.quant.activations import Activations
from lowmem.quant.moments import Moments
from lowmem.quant.skeleton import Call, matrix


class _Reached(Exception):
    """Not an error: the end of what is wanted of a forward pass."""


class BlockRun:
    """A block with its weights, and its inputs.

    Args:
        folder: where inputs of the branches' last layers are kept until `close`.
    """

    def __init__(
        self, block: nn.Module, call: Call, layout: Layout, inputs: Activations, folder: Path, cancel: CancelToken
    ) -> None:
        self._block, self._call, self._layout, self._inputs = block, call, layout, inputs
        self._folder, self._cancel = folder, cancel
        self._replayed: dict[Branch, tuple[Activations, list[Tensor]]] = {}
        parameter = next(block.parameters())
        self._device = parameter.device
        self._sample = 0

    def moments(self, stage: Stage) -> Moments:
        """Moments of the stage's inputs, nothing counted yet."""
        return Moments(self._width(stage), self._device)

    def gather(self, stage: Stage, moments: Moments) -> Iterator[int]:
        """Run every sample up to a stage and finish the `moments` of its inputs."""
        branch = next((branch for branch in self._layout.branches if branch.output in stage.linears), None)
        store = self._store(branch, self._width(stage)) if branch else None

        def reached(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            moments.add(inputs[0])
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
        moments.finish()

    def _width(self, stage: Stage) -> int:
        return matrix(self._block.get_submodule(stage.linears[0])).shape[1]

    def divide(self, stage: Stage, factors: Tensor) -> None:
        """From now on the inputs of a stage are divided by `factors`, its source having changed since they were stored."""
        for branch, (_, divisors) in self._replayed.items():
            if branch.output in stage.linears:
                divisors.append(factors)

    def finish(self, outputs: Activations) -> Iterator[int]:
        """Write the block's outputs, sample by sample."""
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
        hidden = self._inputs.read(index, self._device)
        with ExitStack() as stack:
            for branch, (store, divisors) in self._replayed.items():
                stack.enter_context(self._replaying(branch, store, divisors))
            stack.enter_context(_stoppable(self._block, self._cancel))
            return self._block(hidden, *self._call.args, **self._call.kwargs)

    @contextmanager
    def _replaying(self, branch: Branch, store: Activations, divisors: list[Tensor]) -> Iterator[None]:
        """Within the block the branch is only its last layer, applied to stored inputs."""
        output: Any = self._block.get_submodule(branch.output)

        def replay(*_: object, **__: object) -> object:
            inputs = store.read(self._sample, self._device)
            for factors in divisors:
                inputs /= factors
            result = output(inputs)
            return (result, None) if branch.in_tuple else result

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
    """Let Stop break off a forward pass in front of any part of `module`."""

    def stop(_module: nn.Module, _inputs: tuple[object, ...]) -> None:
        cancel.check()

    handles = [part.register_forward_pre_hook(stop) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
