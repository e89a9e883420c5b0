"""Quantize one decoder block: straight from the file, or with the calibration text run through it.

Both functions are generators of progress, (share of the block from 0 to 1, note), and return the block as stored.
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
from lowmem.messages import msg
from lowmem.models.blocks import Stage
from lowmem.models.modules import set_tensor
from lowmem.quant.activations import Activations
from lowmem.quant.block_run import BlockRun
from lowmem.quant.estimate import PARALLEL_LAYERS
from lowmem.quant.hessian import Hessian
from lowmem.quant.prepared import PreparedQuantization
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.scaling import channel_scales
from lowmem.quant.skeleton import Call, Weights, below, empty, fill, matrix, oriented

Progress = tuple[float, str]


@dataclass
class QuantizedBlock:
    """The stored tensors of a block by their names within it, and the loss of each of its layers."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def add(self, layer: str, weight: Quantized | Packed, request: QuantizeRequest) -> None:
        self.losses[layer] = weight.loss
        parts = request.method.layer_tensors(weight, request.options)
        self.tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}


def plain_block(
    prepared: PreparedQuantization, block: nn.Module, owner: str, weights: Weights
) -> Generator[Progress, None, QuantizedBlock]:
    """Quantize without calibration; `PARALLEL_LAYERS` weights are in memory at a time.

    Args:
        block: without weights.
        owner: its name within the model.
    """
    names = [name.removeprefix(f"{owner}.") for name in below(weights, owner)]
    # Largest first, so that all threads finish at about the same time.
    names.sort(key=lambda name: -weights.elements(f"{owner}.{name}"))
    result, request = QuantizedBlock(), prepared.request

    def quantized(name: str) -> QuantizedBlock:
        prepared.cancel.check()
        layer, stored = name.removesuffix(".weight"), f"{owner}.{name}"
        if layer not in prepared.layout.linears:
            return QuantizedBlock({name: weights.read_unquantized(stored)})
        module, part = block.get_submodule(layer), QuantizedBlock()

        def original() -> Tensor:
            return oriented(module, weights.read(stored).to(prepared.device))

        # No name holds the original, so that it is freed before its codes are packed.
        part.add(layer, request.method.quantize([original()], None, request.options, prepared.cancel)[0], request)
        return part

    with threads(PARALLEL_LAYERS) as pool:
        for number, part in enumerate(pool.map(quantized, names)):
            yield number / len(names), names[number].removesuffix(".weight")
            prepared.cancel.check()  # the threads may have finished before Stop
            result.tensors |= part.tensors
            result.losses |= part.losses
    return result


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads divide torch's among them, so that reading, rounding and packing of layers overlap.

    Leaving the context cancels what has not started.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "lowmem-quant", torch.set_num_threads, (max(1, before // count),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def calibrated_block(
    prepared: PreparedQuantization,
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
        outputs: None for the last block.
        folder: for temporary files.

    Raises:
        CorruptModel: the block computes NaN or infinite values.
    """
    partial = _PartialBlock(prepared, block, owner, weights)
    run = BlockRun(block, call, prepared.layout, inputs, folder, prepared.cancel)
    phases = 2 * len(prepared.layout.stages) + 1
    try:
        for number, stage in enumerate(prepared.layout.stages):
            names = " + ".join(name.rpartition(".")[2] for name in stage.linears)
            hessian = run.hessian(stage)
            for done in run.accumulate(stage, hessian):
                yield (2 * number + done / inputs.samples) / phases, msg("inputs of {names}", names=names)
            yield (2 * number + 1) / phases, msg("quantizing {names}", names=names)
            if not bool(hessian.matrix.diagonal().isfinite().all()):
                raise CorruptModel(
                    msg("{owner} computes NaN or infinite values.", owner=owner), msg("Choose another model.")
                )
            scales = partial.scale_channels(stage, hessian)
            if scales is not None:
                run.divide(stage, scales)
            loss = partial.quantize(stage, hessian)
            yield (2 * number + 2) / phases, msg("{names}: loss {loss:.2e}", names=names, loss=loss)
        for done in run.finish(outputs) if outputs else ():
            yield (phases - 1 + done / inputs.samples) / phases, msg("outputs of the block")
        return partial.result()
    finally:
        run.close()
        empty(block)


class _PartialBlock:
    """A block whose layers are replaced, stage by stage, by their dequantized weights."""

    def __init__(self, prepared: PreparedQuantization, block: nn.Module, owner: str, weights: Weights) -> None:
        self._prepared, self._request, self._block = prepared, prepared.request, block
        self._linears: dict[str, Quantized] = {}
        layers = {f"{name}.weight" for name in prepared.layout.linears}
        self._dtypes = fill(block, owner, weights, layers, prepared.device)

    def scale_channels(self, stage: Stage, hessian: Hessian) -> Tensor | None:
        """Scale the input channels of a stage and fold the inverse into its source, the norm or layer before it.

        Returns:
            The scales [in]; None without activation-aware scaling, or where nothing can absorb them.
        """
        if not (self._request.options.scale_channels and stage.source):
            return None
        layers = [self._block.get_submodule(name) for name in stage.linears]
        scales = channel_scales(
            [matrix(layer) for layer in layers], hessian, self._request.options, self._prepared.cancel
        )
        if stage.source in self._linears:
            self._divide_linear(stage.source, scales)
        else:
            self._divide_norm(stage.source, scales)
        for layer in layers:
            matrix(layer).mul_(scales)
        hessian.divide(scales)
        return scales

    def _divide_norm(self, name: str, divisors: Tensor) -> None:
        norm: Any = self._block.get_submodule(name)
        offset = self._prepared.layout.norm_offset
        self._set(f"{name}.weight", (norm.weight.data + offset) / divisors - offset)
        if getattr(norm, "bias", None) is not None:
            self._set(f"{name}.bias", norm.bias.data / divisors)

    def _divide_linear(self, name: str, divisors: Tensor) -> None:
        layer: Any = self._block.get_submodule(name)
        weight, rows = self._linears[name], len(divisors)
        scales = weight.scales.float()
        scales[-rows:] /= divisors[:, None]
        self._place(name, replace(weight, scales=as_stored(scales).half()))
        if getattr(layer, "bias", None) is not None:
            bias = layer.bias.data.clone()
            bias[-rows:] /= divisors
            self._set(f"{name}.bias", bias)

    def _set(self, name: str, values: Tensor) -> None:
        """Set a tensor that is not quantized, rounded to the dtype it is stored in."""
        set_tensor(self._block, name, values.to(self._dtypes[name]).float())

    def quantize(self, stage: Stage, hessian: Hessian) -> float:
        """Quantize all layers of a stage; returns their mean loss."""
        layers = [matrix(self._block.get_submodule(name)) for name in stage.linears]
        solved = self._request.method.quantize(layers, hessian, self._request.options, self._prepared.cancel)
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
            result.add(name, weight, self._request)
        return result
