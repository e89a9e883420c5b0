"""Quantize one decoder block: straight from the file, or with the calibration text run through it.

Both functions are generators of progress, (share of the block from 0 to 1, note), and return the block as stored.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.background import ThreadPool
from lowmem.errors import CorruptModel
from lowmem.kernels.grid import as_stored
from lowmem.kernels.quantized import Packed, Quantized
from lowmem.messages import msg
from lowmem.models.blocks import Block, Stage
from lowmem.models.modules import set_tensor
from lowmem.quant.activations import Activations
from lowmem.quant.block_run import BlockRun
from lowmem.quant.estimate import PARALLEL_LAYERS, experts_at_once
from lowmem.quant.folding import with_sources
from lowmem.quant.hessian import Hessian
from lowmem.quant.prepared import PreparedQuantization
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.scaling import channel_scales
from lowmem.quant.skeleton import Call, Matrix, Weights, below, empty, fill
from lowmem.quant.skeleton import matrix as matrix_of

Progress = tuple[float, str]

FEW_TOKENS = 64
"""An expert that fewer tokens of the calibration text were routed to has no statistics of its own."""


@dataclass
class QuantizedBlock:
    """The stored tensors of a block by their names in the result, and the loss of each of its layers.

    `shared` counts the experts that were quantized by the statistics of all.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    shared: int = 0

    def add(self, layer: str, weight: Quantized | Packed, request: QuantizeRequest) -> None:
        self.losses[layer] = weight.loss
        parts = request.method.layer_tensors(weight, request.options)
        self.tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}


def plain_block(
    prepared: PreparedQuantization, owner: str, weights: Weights
) -> Generator[Progress, None, QuantizedBlock]:
    """Quantize the block `owner` without calibration; `PARALLEL_LAYERS` weights are in memory at a time."""
    jobs: list[tuple[int, str, Matrix | None]] = []
    for name in below(weights, owner):
        found = weights.matrices(name) if name in prepared.quantized else [None]
        jobs += [(weights.elements(name) // len(found), name, matrix) for matrix in found]
    # Largest first, so that all threads finish at about the same time.
    jobs.sort(key=lambda job: -job[0])
    result, request = QuantizedBlock(), prepared.request

    def quantized(job: tuple[int, str, Matrix | None]) -> QuantizedBlock:
        prepared.cancel.check()
        _, name, matrix = job
        if matrix is None:
            return QuantizedBlock({weights.output_name(name): weights.read_unquantized(name)})
        part = QuantizedBlock()
        # No name holds the original, so that it is freed before its codes are packed.
        part.add(
            matrix.layer, request.method.quantize([_read(matrix)], None, request.options, prepared.cancel)[0], request
        )
        return part

    def _read(matrix: Matrix) -> Tensor:
        return weights.read_matrix(matrix).to(prepared.device)

    with threads(PARALLEL_LAYERS) as pool:
        for number, part in enumerate(pool.map(quantized, jobs)):
            yield number / len(jobs), jobs[number][1].removeprefix(f"{owner}.").removesuffix(".weight")
            prepared.cancel.check()  # the threads may have finished before Stop
            result.tensors |= part.tensors
            result.losses |= part.losses
    return result


@contextmanager
def threads(count: int) -> Iterator[ThreadPool]:
    """A pool whose threads divide torch's among them, so that reading, rounding and packing of layers overlap.

    Leaving the context cancels what has not started.
    """
    before = torch.get_num_threads()
    pool = ThreadPool(count, functools.partial(torch.set_num_threads, max(1, before // count)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def calibrated_block(
    prepared: PreparedQuantization,
    kind: Block,
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
    run = BlockRun(block, call, kind, inputs, folder, prepared.cancel)
    try:
        if prepared.request.options.scale_channels:
            found = {name for name in kind.linears if partial.matrices(name)}
            kind = with_sources(block, kind, found, run.block, run.inputs(0), prepared.cancel)
        stages = [stage for stage in kind.stages if any(partial.matrices(name) for name in stage.linears)]
        phases = 2 * len(stages) + 1
        for number, stage in enumerate(stages):
            names = " + ".join(name.rpartition(".")[2] for name in stage.linears)
            quantized = partial.experts if partial.has_experts(stage) else partial.layers
            for share, note in quantized(stage, run, names):
                yield (2 * number + share) / phases, note
        partial.plain()
        for done in run.finish(outputs) if outputs else ():
            yield (phases - 1 + done / inputs.samples) / phases, msg("outputs of the block")
        return partial.result()
    finally:
        run.close()
        empty(block)


class _PartialBlock:
    """A block whose layers are replaced, stage by stage, by their dequantized weights."""

    def __init__(self, prepared: PreparedQuantization, block: nn.Module, owner: str, weights: Weights) -> None:
        self._prepared, self._request, self._block, self._owner = prepared, prepared.request, block, owner
        self._weights = weights
        self._quantized: dict[Matrix, Quantized] = {}
        self._shared: set[int] = set()
        self._dtypes = fill(block, owner, weights, prepared.quantized, prepared.device)
        self._matrices = {
            name.removeprefix(f"{owner}.").removesuffix(".weight"): weights.matrices(name)
            for name in below(weights, owner)
            if name in prepared.quantized
        }

    def matrices(self, name: str) -> list[Matrix]:
        """Of a linear layer or of a projection of experts; empty if it stays as it is."""
        return self._matrices.get(name, [])

    def has_experts(self, stage: Stage) -> bool:
        return any(matrix.expert >= 0 for name in stage.linears for matrix in self.matrices(name))

    def _view(self, matrix: Matrix) -> Tensor:
        """The matrix [out, in] within the block."""
        weight = self._block.get_parameter(matrix.parameter.removeprefix(f"{self._owner}."))
        return matrix.view(weight.data, self._weights.transposed(matrix.parameter))

    def layers(self, stage: Stage, run: BlockRun, names: str) -> Iterator[Progress]:
        """Quantize the linear layers of a stage; yields progress from 0 to 2."""
        hessian = run.hessian(stage)
        for done in run.accumulate(stage, hessian):
            yield done / run.samples, msg("inputs of {names}", names=names)
        yield 1, msg("quantizing {names}", names=names)
        self._check(hessian)
        scales = self._scale_channels(stage, hessian)
        if scales is not None:
            run.divide(stage, scales)
        loss = self._solve([matrix for name in stage.linears for matrix in self.matrices(name)], hessian)
        yield 2, msg("{names}: loss {loss:.2e}", names=names, loss=loss)

    def experts(self, stage: Stage, run: BlockRun, names: str) -> Iterator[Progress]:
        """Quantize a projection of all experts, each by the tokens that are routed to it; yields progress from 0 to 2.

        An expert that saw fewer than `FEW_TOKENS` is quantized by the inputs of all experts.
        """
        matrices = self.matrices(stage.linears[0])
        columns, count = self._view(matrices[0]).shape[1], matrices[-1].expert + 1
        at_once = experts_at_once(columns, count)
        shared = Hessian(columns, self._prepared.device)
        losses: list[float] = []
        passes = range(0, count, at_once)
        for number, first in enumerate(passes):
            chosen = {
                expert: Hessian(columns, self._prepared.device) for expert in range(first, min(first + at_once, count))
            }
            for done in run.accumulate_experts(stage, chosen, None if number else shared):
                yield 2 * (number + done / run.samples) / len(passes), msg("inputs of {names}", names=names)
            self._check(shared)
            for expert, hessian in chosen.items():
                seen = hessian.tokens >= FEW_TOKENS
                if not seen:
                    self._shared.add(expert)
                own = hessian if seen else shared.copy()
                losses.append(self._solve([one for one in matrices if one.expert == expert], own))
                yield 2 * (number + 0.5) / len(passes), msg("quantizing {names}", names=names)
        yield 2, msg("{names}: loss {loss:.2e}", names=names, loss=sum(losses) / len(losses))

    def plain(self) -> None:
        """Round what no stage has: layers that the calibration text did not reach."""
        for matrices in self._matrices.values():
            for matrix in matrices:
                if matrix not in self._quantized:
                    unit = Hessian(self._view(matrix).shape[1], self._prepared.device)
                    unit.matrix.fill_diagonal_(1)
                    unit.magnitude.fill_(1)
                    self._solve([matrix], unit)

    def _check(self, hessian: Hessian) -> None:
        if not bool(hessian.matrix.diagonal().isfinite().all()):
            raise CorruptModel(
                msg("{owner} computes NaN or infinite values.", owner=self._owner), msg("Choose another model.")
            )

    def _scale_channels(self, stage: Stage, hessian: Hessian) -> Tensor | None:
        """Scale the input channels of a stage and fold the inverse into its source, the norm or layer before it.

        Returns:
            The scales [in]; None without activation-aware scaling, or where nothing can absorb them.
        """
        if not (self._request.options.scale_channels and stage.source):
            return None
        layers = [self._view(matrix) for name in stage.linears for matrix in self.matrices(name)]
        scales = channel_scales(layers, hessian, self._request.options, self._prepared.cancel)
        if source := self.matrices(stage.source):
            self._divide_quantized(source[0], stage.source, scales)
        else:
            self._divide_norm(stage, scales)
        for name in stage.linears:
            weight = matrix_of(self._block.get_submodule(name)).mul_(scales)
            if not self.matrices(name):  # stays as it is, in the dtype it is stored in
                weight.copy_(weight.to(self._dtypes[f"{name}.weight"]))
        hessian.divide(scales)
        return scales

    def _divide_norm(self, stage: Stage, divisors: Tensor) -> None:
        norm: Any = self._block.get_submodule(stage.source)
        self._set(f"{stage.source}.weight", (norm.weight.data + stage.offset) / divisors - stage.offset)
        if getattr(norm, "bias", None) is not None:
            self._set(f"{stage.source}.bias", norm.bias.data / divisors)

    def _divide_quantized(self, matrix: Matrix, name: str, divisors: Tensor) -> None:
        layer: Any = self._block.get_submodule(name)
        weight, rows = self._quantized[matrix], len(divisors)
        scales = weight.scales.float()
        scales[-rows:] /= divisors[:, None]
        self._place(matrix, replace(weight, scales=as_stored(scales).half()))
        if getattr(layer, "bias", None) is not None:
            bias = layer.bias.data.clone()
            bias[-rows:] /= divisors
            self._set(f"{name}.bias", bias)

    def _set(self, name: str, values: Tensor) -> None:
        """Set a tensor that is not quantized, rounded to the dtype it is stored in."""
        set_tensor(self._block, name, values.to(self._dtypes[name]).float())

    def _solve(self, matrices: Sequence[Matrix], hessian: Hessian) -> float:
        """Quantize matrices that share their input; returns their mean loss."""
        views = [self._view(matrix) for matrix in matrices]
        solved = self._request.method.quantize(views, hessian, self._request.options, self._prepared.cancel)
        for matrix, weight in zip(matrices, solved, strict=True):
            self._place(matrix, weight)
        return sum(weight.loss for weight in solved) / len(solved)

    def _place(self, matrix: Matrix, weight: Quantized) -> None:
        self._quantized[matrix] = weight
        weight.dequantize(out=self._view(matrix))

    def result(self) -> QuantizedBlock:
        tensors: dict[str, Any] = dict([*self._block.named_parameters(), *self._block.named_buffers()])
        result = QuantizedBlock(
            {
                self._weights.output_name(f"{self._owner}.{name}"): tensors[name].data.to(dtype)
                for name, dtype in self._dtypes.items()
            },
            shared=len(self._shared),
        )
        for matrix, weight in self._quantized.items():
            result.add(matrix.layer, weight, self._request)
        return result
