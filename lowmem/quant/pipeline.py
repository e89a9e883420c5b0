"""Quantize a model block by block; no more than one block is in memory at a time.

Tensors outside the blocks are copied, then each block is read, quantized, written and dropped. Calibrated methods see
each layer's inputs as computed by the quantized layers before it (sequential calibration), so that later layers
compensate for earlier errors. The journal is updated after every block; a killed run continues from there and ends
with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import CorruptModel, file_error, file_errors, is_out_of_memory
from lowmem.events import CancelToken, Receipt, Step, WithResult
from lowmem.kernels.packed_rows import PackedRows, quantize_rows
from lowmem.machine.monitor import PeakMeter, quick_collections, release_memory
from lowmem.messages import msg
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.encoded import CODES, SCALES
from lowmem.models.modules import empty_model
from lowmem.models.packed_rows import dequantize_rows
from lowmem.quant.activations import Activations
from lowmem.quant.block import Progress, QuantizedBlock, calibrated_block, plain_block
from lowmem.quant.calibration import Samples
from lowmem.quant.journal import Journal, check_output, opened, publish
from lowmem.quant.layers import wide_layers
from lowmem.quant.prepared import PreparedQuantization
from lowmem.quant.receipts import quantize_receipt, write_model_card
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.saving import write_companions
from lowmem.quant.shards import Shards
from lowmem.quant.skeleton import Call, Entrance, Weights
from lowmem.units import format_seconds

Events = Generator[Step, None, None]

BLOCK_STEPS = 100
"""Units of progress that a block counts for."""


def quantize_folder(
    folder: Path, request: QuantizeRequest, cancel: CancelToken | None = None
) -> Iterator[Step | Receipt]:
    """Quantize the model in `folder` as `request` says; the last event is the receipt.

    An unfinished run of the same request is continued. `request.out` appears once it is complete.

    Raises:
        Unsupported, BadInput: the model cannot be quantized so; `request.out` exists, or an unfinished run of another request
            does and `request.restart` is off.
        DiskFull, DoesNotFit: before the work begins.
        CorruptModel: a weight is NaN or infinite, or an unfinished folder is damaged.
        OutOfMemory: the process passed its limit. Cancelled: within a second.
    """
    with file_errors(msg("{out} was not finished", out=request.out.name)):
        prepared = PreparedQuantization.prepare(folder, request, cancel or CancelToken())
        check_output(request.out)
        prepared.check_room()
        samples = prepared.samples()
        yield from _quantized(prepared, samples)


def _quantized(prepared: PreparedQuantization, samples: Samples) -> Iterator[Step | Receipt]:
    request, threads = prepared.request, torch.get_num_threads()
    unfinished = opened(request.out, prepared.settings(samples), threads, request.restart)
    with PeakMeter(request.budget) as meter, unfinished as (part, journal):
        resumed = journal.blocks
        torch.set_num_threads(journal.threads)
        try:
            for step in Pipeline(prepared, part, journal, samples).run():
                meter.check()
                yield step
            wide = wide_layers(prepared.spec, request.options)
            write_companions(prepared.folder, part, request, wide, journal.tables)
            receipt = quantize_receipt(prepared, part, journal, meter.peak, resumed)
            write_model_card(prepared, part, receipt)
            publish(part, request.out)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            what = msg(
                "{out} is unfinished at block {blocks}",
                out=request.out.name,
                blocks=min(journal.blocks + 1, len(prepared.blocks)),
            )
            raise file_error(error, what, msg("Free some space and start again; finished blocks are kept.")) from error
        finally:
            torch.set_num_threads(threads)
    yield receipt


class Pipeline:
    """A quantization in the folder `part`, continuing where its journal ends."""

    def __init__(self, prepared: PreparedQuantization, part: Path, journal: Journal, samples: Samples) -> None:
        self._prepared, self._part, self._journal, self._samples = prepared, part, journal, samples
        self._started, self._seconds_before = time.monotonic(), journal.seconds
        self._first_block = journal.blocks

    def run(self) -> Events:
        """Quantize all unfinished blocks; afterwards `part` holds every weight."""
        model = empty_model(self._prepared.folder)
        with Checkpoint(self._prepared.folder) as checkpoint, quick_collections():
            weights = Weights(model, checkpoint, self._prepared.spec.tensors)
            shards = Shards(self._part, self._journal.shards)
            try:
                if not self._journal.shards:
                    yield from self._begin(model, weights, shards)
                calls = yield from self._enter(model, weights)
                for index in range(self._journal.blocks, len(self._prepared.blocks)):
                    yield from self._block(model, weights, shards, index, calls)
                self._journal.seconds = self._seconds()
                shards.finish()
                for left in self._part.glob("block-*.bin"):
                    left.unlink()
            finally:
                shards.close()

    def _begin(self, model: Any, weights: Weights, shards: Shards) -> Events:
        """Embed the calibration text, and copy the tensors outside the blocks."""
        if self._samples:
            yield self._step(0, 0.0, msg("Embedding the calibration text"))
            self._journal.activations = "block-0.bin"
            with self._entrance(model, weights) as entrance, self._activations() as inputs:
                entrance.check_calls()
                for index in range(len(self._samples)):
                    self._prepared.cancel.check()
                    inputs.write(index, entrance.hidden_states(index))
                self._journal.checksum = inputs.checksum
            release_memory()
        request, tables = self._prepared.request, self._prepared.tables
        for name in weights:
            self._prepared.cancel.check()
            if not name.startswith(f"{self._prepared.blocks.path}."):
                if name in tables:
                    yield self._step(0, 0.0, msg("Packing {name}", name=name))
                    shards.add(self._packed(weights, name))
                    release_memory()
                else:
                    yield self._step(0, 0.0, msg("Copying {name}", name=name))
                    shards.add([(weights.output_name(name), weights.read_unquantized(name))])
        self._journal.tables = {weights.output_name(name): request.embedding_bits for name in sorted(tables)}
        self._commit(shards)

    def _packed(self, weights: Weights, name: str) -> Iterator[tuple[str, Tensor]]:
        """The parts of a packed table, of whose original only some rows are in memory at a time."""

        def read(start: int, stop: int) -> Tensor:
            self._prepared.cancel.check()
            return weights.read_rows(name, start, stop)

        rows, columns = weights.shape(name)
        table = PackedRows.quantized((rows, columns), read, self._prepared.request.embedding_bits)
        stored = weights.output_name(name)
        yield f"{stored}{CODES}", table.codes
        yield f"{stored}{SCALES}", table.scales

    def _embedded(self, weights: Weights, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding as the result holds them."""
        if name not in self._prepared.tables:
            return weights.read_unquantized(name)[ids]
        bits = self._prepared.request.embedding_bits
        return dequantize_rows(*quantize_rows(weights.read_chosen_rows(name, ids), bits), bits)

    def _enter(self, model: Any, weights: Weights) -> Generator[Step, None, list[Call]]:
        """How the model calls each block. Inputs that an earlier run left are checked first."""
        if not self._samples or self._journal.blocks == len(self._prepared.blocks):
            return []
        if self._journal.blocks:
            yield self._step(self._journal.blocks, 0.0, msg("Continuing an unfinished run"))
            with self._activations() as inputs:
                if inputs.read_checksum() != self._journal.checksum:
                    raise CorruptModel(
                        msg("The activations in the unfinished {part} are damaged.", part=self._part),
                        msg("Delete {part} and start again.", part=self._part),
                    )
        with self._entrance(model, weights) as entrance:
            calls = entrance.calls()
        release_memory()
        return [_moved(call, self._prepared.device) for call in calls]

    def _entrance(self, model: Any, weights: Weights) -> Entrance:
        return Entrance(model, self._prepared.blocks, weights, self._samples, self._embedded)

    def _activations(self, name: str = "") -> Activations:
        calibration = self._prepared.request.calibration
        path = self._part / (name or self._journal.activations)
        return Activations(path, calibration.samples, calibration.length, self._prepared.spec.hidden)

    def _block(self, model: Any, weights: Weights, shards: Shards, index: int, calls: list[Call]) -> Events:
        owner = f"{self._prepared.blocks.path}.{index}"
        module = model.get_submodule(owner)
        if self._samples:
            block = yield from self._steps(index, self._calibrated(module, owner, weights, index, calls[index]))
        else:
            block = yield from self._steps(index, plain_block(self._prepared, owner, weights))
        shards.add(block.tensors.items())
        self._journal.losses |= block.losses
        self._journal.shared += block.shared
        self._journal.blocks = index + 1
        self._commit(shards)
        (self._part / f"block-{index}.bin").unlink(missing_ok=True)
        del block
        release_memory()

    def _calibrated(
        self, module: nn.Module, owner: str, weights: Weights, index: int, call: Call
    ) -> Generator[Progress, None, QuantizedBlock]:
        """Quantize a block whose inputs are in a file; its outputs become the next block's inputs."""
        following = "" if index + 1 == len(self._prepared.blocks) else f"block-{index + 1}.bin"
        with ExitStack() as files:
            inputs = files.enter_context(self._activations())
            outputs = files.enter_context(self._activations(following)) if following else None
            kind = self._prepared.blocks[index]
            block = yield from calibrated_block(
                self._prepared, kind, module, owner, weights, call, inputs, outputs, self._part
            )
            self._journal.activations, self._journal.checksum = following, outputs.checksum if outputs else 0
        return block

    def _commit(self, shards: Shards) -> None:
        self._journal.shards = shards.state()
        self._journal.seconds = self._seconds()
        self._journal.write(self._part)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _steps(
        self, index: int, made: Generator[Progress, None, QuantizedBlock]
    ) -> Generator[Step, None, QuantizedBlock]:
        steps = WithResult(made)
        for share, note in steps:
            yield self._step(
                index,
                share,
                msg("Block {index} of {count}, {note}", index=index + 1, count=len(self._prepared.blocks), note=note),
            )
        return steps.result

    def _step(self, index: int, share: float, note: str) -> Step:
        """Progress of `share` (0 to 1) within block `index`, with the time left once there is enough to extrapolate."""
        count, done = len(self._prepared.blocks), index + share
        here = done - self._first_block
        if here >= 0.5:
            left = (time.monotonic() - self._started) / here * (count - done)
            note = msg("{note} · {left} left", note=note, left=format_seconds(left))
        return Step(round(BLOCK_STEPS * done), BLOCK_STEPS * count, note)


def _moved(call: Call, device: torch.device) -> Call:
    """The call with its tensors on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(moved(item) for item in value)
        return value

    return replace(call, args=moved(call.args), kwargs={name: moved(value) for name, value in call.kwargs.items()})
