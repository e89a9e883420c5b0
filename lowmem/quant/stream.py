"""The model goes by: outside tensors copied, block after block quantized and written, the journal kept.

Nothing here holds more than a block. What is known of a run that was killed is in its `Journal` and in the files
beside it; the steps that follow from there write the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.errors import CorruptModel
from lowmem.events import Step
from lowmem.machine.monitor import release_memory
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.modules import empty_model
from lowmem.quant.activations import Activations
from lowmem.quant.block import Progress, QuantizedBlock, calibrated_block, plain_block
from lowmem.quant.calibration import Samples
from lowmem.quant.job import Job
from lowmem.quant.journal import Journal
from lowmem.quant.shards import Shards
from lowmem.quant.skeleton import Call, Entrance, Weights
from lowmem.units import format_seconds

Events = Generator[Step, None, None]

PARTS = 100
"""Steps that a block counts for in the progress."""


class Stream:
    """One run of a job in the folder `part`, from where its journal says."""

    def __init__(self, job: Job, part: Path, journal: Journal, samples: Samples) -> None:
        self._job, self._part, self._journal, self._samples = job, part, journal, samples
        self._started, self._seconds_before = time.monotonic(), journal.seconds
        self._first_block = journal.blocks

    def run(self) -> Events:
        """Quantize all blocks that are not finished; afterwards `part` holds every weight."""
        model = empty_model(self._job.folder)
        with Checkpoint(self._job.folder) as checkpoint:
            weights = Weights(model, checkpoint)
            shards = Shards(self._part, self._journal.shards)
            try:
                if not self._journal.shards:
                    yield from self._begin(model, weights, shards)
                calls = yield from self._enter(model, weights)
                for index in range(self._journal.blocks, self._job.layout.count):
                    yield from self._block(model, weights, shards, index, calls)
                self._journal.seconds = self._seconds()
                shards.finish()
            finally:
                shards.close()

    def _begin(self, model: Any, weights: Weights, shards: Shards) -> Events:
        """Copy what is outside the blocks, and embed the calibration text."""
        for name in weights:
            self._job.cancel.check()
            if not name.startswith(f"{self._job.layout.path}."):
                yield self._step(0, 0.0, f"Copying {name}")
                shards.add([(name, weights.read_kept(name))])
        if self._samples:
            yield self._step(0, 0.0, "Embedding the calibration text")
            self._journal.activations = "block-0.bin"
            with self._entrance(model, weights) as entrance, self._activations() as inputs:
                for index in range(len(self._samples)):
                    self._job.cancel.check()
                    inputs.write(index, entrance.hidden_states(index))
                self._journal.checksum = inputs.checksum
        self._commit(shards)

    def _enter(self, model: Any, weights: Weights) -> Generator[Step, None, list[Call]]:
        """How each block is called; its inputs were checked if an earlier run left them."""
        if not self._samples or self._journal.blocks == self._job.layout.count:
            return []
        if self._journal.blocks:
            yield self._step(self._journal.blocks, 0.0, "Going on with an unfinished run")
            with self._activations() as inputs:
                if inputs.read_checksum() != self._journal.checksum:
                    raise CorruptModel(
                        f"The activations in the unfinished {self._part} are damaged.",
                        f"Delete {self._part} and start again.",
                    )
        with self._entrance(model, weights) as entrance:
            calls = entrance.calls()
        release_memory()
        return [_moved(call, self._job.device) for call in calls]

    def _entrance(self, model: Any, weights: Weights) -> Entrance:
        return Entrance(model, self._job.layout, weights, self._samples)

    def _activations(self, name: str = "") -> Activations:
        path = self._part / (name or self._journal.activations)
        return Activations(path, self._job.calibration.samples, self._job.calibration.length, self._job.spec.hidden)

    def _block(self, model: Any, weights: Weights, shards: Shards, index: int, calls: list[Call]) -> Events:
        owner = f"{self._job.layout.path}.{index}"
        module = model.get_submodule(owner)
        if self._samples:
            block = yield from self._steps(index, self._calibrated(module, owner, weights, index, calls[index]))
        else:
            block = yield from self._steps(index, plain_block(self._job, module, owner, weights))
        shards.add((f"{owner}.{name}", tensor) for name, tensor in block.tensors.items())
        self._journal.losses |= {f"{owner}.{name}": loss for name, loss in block.losses.items()}
        self._journal.blocks = index + 1
        self._commit(shards)
        (self._part / f"block-{index}.bin").unlink(missing_ok=True)
        del block
        release_memory()

    def _calibrated(
        self, module: nn.Module, owner: str, weights: Weights, index: int, call: Call
    ) -> Generator[Progress, None, QuantizedBlock]:
        """The block, quantized with its inputs in a file; its outputs are the next one's."""
        following = "" if index + 1 == self._job.layout.count else f"block-{index + 1}.bin"
        with ExitStack() as files:
            inputs = files.enter_context(self._activations())
            outputs = files.enter_context(self._activations(following)) if following else None
            block = yield from calibrated_block(self._job, module, owner, weights, call, inputs, outputs, self._part)
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
        while True:
            try:
                share, note = next(made)
            except StopIteration as end:
                return end.value
            yield self._step(index, share, f"Block {index + 1} of {self._job.layout.count}, {note}")

    def _step(self, index: int, share: float, note: str) -> Step:
        """Progress within block `index`, with the time left once there is something to tell it from."""
        count, done = self._job.layout.count, index + share
        here = done - self._first_block
        if here >= 0.5:
            left = (time.monotonic() - self._started) / here * (count - done)
            note = f"{note} · {format_seconds(left)} left"
        return Step(round(PARTS * done), PARTS * count, note)


def _moved(call: Call, device: torch.device) -> Call:
    """The call with its tensors on `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return type(value)(moved(item) for item in value)
        return value

    return replace(call, args=moved(call.args), kwargs={name: moved(value) for name, value in call.kwargs.items()})
