"""Finds what a per-channel scale can be folded into, by trying it: the outputs of the block must not change.

The input of a stage may come from a norm, whose weights take the inverse of the scale, or, channel by channel, from the last
outputs of a linear layer before it. Whether it does depends on the family's code: on activations between them, on queries that
share a value, on other readers of a norm. A trial with random factors tells.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem.events import CancelToken
from lowmem.models.blocks import Block, Stage
from lowmem.quant.skeleton import matrix

TOLERANCE = 1e-3
"""Most change of what a block adds, relative to it; a scale that is not absorbed changes it by a tenth and more."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Candidate:
    source: str
    offset: float = 0.0


def with_sources(
    block: nn.Module, kind: Block, quantized: Collection[str], run: Run, inputs: Tensor, cancel: CancelToken
) -> Block:
    """`kind` with the source of each of its stages.

    Args:
        block: with its weights.
        quantized: names of the linear layers, within the block, that are quantized.
        run: passes hidden states through the block.
        inputs: hidden states [1, tokens, width].
    """
    stages = []
    expected = run(inputs)
    size = (expected - inputs).norm()
    norms = _norms(block, kind, run, inputs)
    before: list[str] = []
    for stage in kind.stages:
        linear = all(isinstance(_submodule(block, name), (nn.Linear, Conv1D)) for name in stage.linears)
        candidates = _candidates(block, stage, norms.get(stage.linears[0], ""), before) if linear else ()
        for candidate in candidates:
            cancel.check()
            with _folded(block, stage, candidate):
                change = (run(inputs) - expected).norm()
            if change <= TOLERANCE * size:
                stage = replace(stage, source=candidate.source, offset=candidate.offset)
                break
        stages.append(stage)
        before = [*(name for name in stage.linears if name in quantized), *before]
    return replace(kind, stages=tuple(stages))


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    return dict(block.named_modules()).get(name)


def _norms(block: nn.Module, kind: Block, run: Run, inputs: Tensor) -> dict[str, str]:
    """{first linear layer of a stage: the module with a weight per channel whose output the stage reads}."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}

    def wrote(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[output.data_ptr()] = (name, output)  # held, so that no other tensor gets its address

        return note

    def reads(name: str) -> Callable[..., None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            source, output = made.get(inputs[0].data_ptr(), ("", None))
            if output is not None and output.numel() == inputs[0].numel():
                found[name] = source

        return note

    handles = [
        module.register_forward_hook(wrote(name))
        for name, module in block.named_modules()
        if (weight := module._parameters.get("weight")) is not None and weight.dim() == 1
    ]
    for stage in kind.stages:
        module = _submodule(block, stage.linears[0])
        handles += [module.register_forward_pre_hook(reads(stage.linears[0]))] if module is not None else []
    try:
        run(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _candidates(block: nn.Module, stage: Stage, norm: str, before: Collection[str]) -> Iterator[_Candidate]:
    width = matrix(block.get_submodule(stage.linears[0])).shape[1]
    if norm:
        weight: Any = block.get_submodule(norm).weight
        if len(weight) != width:  # a norm of each head
            return
        yield from (_Candidate(norm), _Candidate(norm, 1.0))
        return
    for name in before:
        module = _submodule(block, name)  # None for a projection of stacked experts
        if module is not None and matrix(module).shape[0] >= width:
            yield _Candidate(name)


@contextmanager
def _folded(block: nn.Module, stage: Stage, candidate: _Candidate) -> Iterator[None]:
    """Within the context, random factors are folded into the candidate and multiplied onto the stage's columns."""
    layers = [matrix(block.get_submodule(name)) for name in stage.linears]
    source: Any = block.get_submodule(candidate.source)
    changed = [
        *layers,
        *(source._parameters[name].data for name in ("weight", "bias") if source._parameters.get(name) is not None),
    ]
    originals = [tensor.clone() for tensor in changed]
    width = layers[0].shape[1]
    factors = torch.rand(width, generator=torch.Generator().manual_seed(0)).add_(0.5).to(layers[0].device)
    try:
        for layer in layers:
            layer.mul_(factors)
        divide(source, factors, candidate.offset)
        yield
    finally:
        for tensor, original in zip(changed, originals, strict=True):
            tensor.copy_(original)


def divide(source: Any, divisors: Tensor, offset: float) -> None:
    """Divide the outputs of a norm, or the last outputs of a linear layer, by `divisors`, in place."""
    rows = len(divisors)
    if isinstance(source, (nn.Linear, Conv1D)):
        matrix(source)[-rows:] /= divisors[:, None]
    else:
        source.weight.data.add_(offset).div_(divisors).sub_(offset)
    if source._parameters.get("bias") is not None:
        source.bias.data[-rows:] /= divisors
