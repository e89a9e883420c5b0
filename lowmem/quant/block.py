"""One decoder block becomes codes: straight from the file, or with the calibration text run through it.

Both ways yield how much of the block is done, 0 to 1, and a note; their return value is the block as it is stored.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import CorruptModel
from lowmem.kernels.grid import as_stored
from lowmem.kernels.quantized import Packed, Quantized
from lowmem.models.blocks import Stage
from lowmem.models.modules import set_tensor
from lowmem.quant.activations import Activations
from lowmem.quant.balance import channel_factors
from lowmem.quant.block_run import BlockRun
from lowmem.quant.estimate import AT_ONCE
from lowmem.quant.job import Job
from lowmem.quant.moments import Moments
from lowmem.quant.saving import layer_tensors
from lowmem.quant.skeleton import Call, Weights, below, empty, fill, matrix, oriented

Progress = tuple[float, str]


@dataclass
class QuantizedBlock:
    """What is stored of a block by names within it, and the loss of each of its layers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def add(self, layer: str, weight: Quantized | Packed, layout: str) -> None:
        self.losses[layer] = weight.loss
        self.tensors |= {f"{layer}.{part}": tensor for part, tensor in layer_tensors(weight, layout).items()}


def plain_block(job: Job, block: nn.Module, owner: str, weights: Weights) -> Generator[Progress, None, QuantizedBlock]:
    """Quantize without calibration; `AT_ONCE` weights are in memory at a time.

    Args:
        block: without weights.
        owner: its name within the model.
    """
    names = [name.removeprefix(f"{owner}.") for name in below(weights, owner)]
    # The largest first, so that all threads end at about the same time.
    names.sort(key=lambda name: -weights.elements(f"{owner}.{name}"))
    result = QuantizedBlock()

    def made(name: str) -> QuantizedBlock:
        job.cancel.check()
        layer, stored = name.removesuffix(".weight"), f"{owner}.{name}"
        if layer not in job.layout.linears:
            return QuantizedBlock({name: weights.read_kept(stored)})
        weight = oriented(block.get_submodule(layer), weights.read(stored).to(job.device))
        found = QuantizedBlock()
        found.add(layer, job.method.quantize([weight], None, job.options, job.cancel)[0], job.options.layout)
        return found

    with threads(AT_ONCE) as pool:
        for number, part in enumerate(pool.map(made, names)):
            yield number / len(names), names[number].removesuffix(".weight")
            job.cancel.check()  # the threads may be done by now
            result.tensors |= part.tensors
            result.losses |= part.losses
    return result


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that share torch's; reading, rounding and packing of different layers then overlap.

    What has not begun when the block is left does not begin.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "lowmem-quant", torch.set_num_threads, (max(1, before // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def calibrated_block(
    job: Job,
    block: nn.Module,
    owner: str,
    weights: Weights,
    call: Call,
    inputs: Activations,
    outputs: Activations | None,
    folder: Path,
) -> Generator[Progress, None, QuantizedBlock]:
    """Quantize a block stage by stage and write its `outputs` for `inputs`.

    Args:
        call: how the model calls this block.
        outputs: None when nobody wants them.
        folder: for what is kept until the block is done.
    """
    under_way = _Calibrated(job, block, owner, weights)
    run = BlockRun(block, call, job.layout, inputs, folder, job.cancel)
    phases = 2 * len(job.layout.stages) + 1
    try:
        for number, stage in enumerate(job.layout.stages):
            names = " + ".join(name.rpartition(".")[2] for name in stage.linears)
            moments = run.moments(stage)
            for done in run.gather(stage, moments):
                yield (2 * number + done / inputs.samples) / phases, f"inputs of {names}"
            yield (2 * number + 1) / phases, f"solving {names}"
            if not bool(moments.hessian.diagonal().isfinite().all()):
                raise CorruptModel(f"{owner} computes numbers that are not numbers.", "Choose another model.")
            factors = under_way.balance(stage, moments)
            if factors is not None:
                run.divide(stage, factors)
            loss = under_way.quantize(stage, moments)
            yield (2 * number + 2) / phases, f"{names}: loss {loss:.2e}"
        for done in run.finish(outputs) if outputs else ():
            yield (phases - 1 + done / inputs.samples) / phases, "outputs of the block"
        return under_way.result()
    finally:
        run.close()
        empty(block)


class _Calibrated:
    """A block whose layers are replaced one by one by what their codes stand for."""

    def __init__(self, job: Job, block: nn.Module, owner: str, weights: Weights) -> None:
        self._job, self._block = job, block
        self._linears: dict[str, Quantized] = {}
        layers = {f"{name}.weight" for name in job.layout.linears}
        self._dtypes = fill(block, owner, weights, layers, job.device)

    def balance(self, stage: Stage, moments: Moments) -> Tensor | None:
        """Fold channel factors into the stage's source and its weights; None where there is nothing to fold into."""
        if not (self._job.options.balances and stage.source):
            return None
        layers = [self._block.get_submodule(name) for name in stage.linears]
        factors = channel_factors([matrix(layer) for layer in layers], moments, self._job.options, self._job.cancel)
        if stage.source in self._linears:
            self._divide_linear(stage.source, factors)
        else:
            self._divide_norm(stage.source, factors)
        for layer in layers:
            matrix(layer).mul_(factors)
        moments.divide(factors)
        return factors

    def _divide_norm(self, name: str, factors: Tensor) -> None:
        norm: Any = self._block.get_submodule(name)
        offset = self._job.layout.norm_offset
        self._set(f"{name}.weight", (norm.weight.data + offset) / factors - offset)
        if getattr(norm, "bias", None) is not None:
            self._set(f"{name}.bias", norm.bias.data / factors)

    def _divide_linear(self, name: str, factors: Tensor) -> None:
        layer: Any = self._block.get_submodule(name)
        weight, rows = self._linears[name], len(factors)
        scales = weight.scales.float()
        scales[-rows:] /= factors[:, None]
        self._place(name, replace(weight, scales=as_stored(scales).half()))
        if getattr(layer, "bias", None) is not None:
            bias = layer.bias.data.clone()
            bias[-rows:] /= factors
            self._set(f"{name}.bias", bias)

    def _set(self, name: str, values: Tensor) -> None:
        """A tensor that is not quantized, as it reads back."""
        set_tensor(self._block, name, values.to(self._dtypes[name]).float())

    def quantize(self, stage: Stage, moments: Moments) -> float:
        """Choose codes for all layers of a stage; their mean loss."""
        layers = [matrix(self._block.get_submodule(name)) for name in stage.linears]
        solved = self._job.method.quantize(layers, moments, self._job.options, self._job.cancel)
        for name, weight in zip(stage.linears, solved, strict=True):
            self._place(name, weight)
        return sum(weight.loss for weight in solved) / len(solved)

    def _place(self, name: str, weight: Quantized) -> None:
        self._linears[name] = weight
        weight.dequantize(out=matrix(self._block.get_submodule(name)))

    def result(self) -> QuantizedBlock:
        parameters: dict[str, Any] = dict(self._block.named_parameters())
        result = QuantizedBlock({name: parameters[name].data.to(dtype) for name, dtype in self._dtypes.items()})
        for name, weight in self._linears.items():
            result.add(name, weight, self._job.options.layout)
        return result
