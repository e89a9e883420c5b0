"""What one quantization is: its arguments, what follows from them, and whether it can be done at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lowmem.errors import CorruptModel, DiskFull, DoesNotFit
from lowmem.events import CancelToken
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import disk_free_bytes, probe
from lowmem.machine.monitor import release_memory
from lowmem.models.blocks import Layout, block_layout
from lowmem.models.describe import CONFIG
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.quant.base import Options, Quantizer
from lowmem.quant.calibration import Calibration, Samples, token_samples
from lowmem.quant.estimate import Estimate, check_shapes, estimate
from lowmem.quant.journal import part_of
from lowmem.units import format_bytes
from lowmem.version import __version__


@dataclass(frozen=True)
class Job:
    """A model in `folder` to be quantized by `method`; `make` checks and describes it."""

    folder: Path
    method: Quantizer
    options: Options
    calibration: Calibration
    device: torch.device
    cancel: CancelToken
    layout: Layout
    spec: ModelSpec
    estimate: Estimate

    @classmethod
    def make(
        cls,
        folder: Path,
        method: Quantizer,
        options: Options,
        calibration: Calibration,
        device: str,
        cancel: CancelToken,
    ) -> Job:
        """
        Raises:
            Unsupported: the model cannot be taken apart, or its layers cannot be packed.
            BadInput: options that do not go with each other or with its shapes.
        """
        options.check()
        config = read_object(LocalFolder(folder), CONFIG)
        layout = block_layout(config)
        spec = read_spec(str(folder))
        check_shapes(spec, options.group_size)
        expected = estimate(spec, method, options, calibration, probe().runtime_bytes)
        return cls(folder, method, options, calibration, torch.device(device), cancel, layout, spec, expected)

    def check_room(self, out: Path, budget: MemoryBudget) -> None:
        """Refuse what cannot end well.

        Raises:
            DiskFull, DoesNotFit: naming both numbers.
        """
        part = part_of(out)
        here = sum(file.stat().st_size for file in part.glob("*")) if part.is_dir() else 0
        needed, free = self.estimate.disk_bytes - here, disk_free_bytes(out.absolute().parent)
        if needed > free:
            raise DiskFull(
                f"Quantizing {self.spec.name} needs {format_bytes(needed)} of disk, {format_bytes(free)} are free.",
                "Delete something, choose fewer bits or samples, or another disk.",
            )
        if self.estimate.ram_bytes > (limit := budget.limit("ram")):
            raise DoesNotFit(
                f"Quantizing {self.spec.name} with {self.method.label} is predicted to take "
                f"{format_bytes(self.estimate.ram_bytes)} of RAM, the budget is {format_bytes(limit)}.",
                "Raise the budget, or choose round to nearest or HQQ, which need less.",
            )

    def samples(self) -> Samples:
        """The calibration text as token ids; none for methods that need none.

        Raises:
            BadInput, Offline: see `token_samples`. CorruptModel: no tokenizer.
        """
        if not self.method.calibrated:
            return ()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise CorruptModel(
                f"The tokenizer in {self.folder.name} cannot be read: {reason}", "Add the model's tokenizer.json."
            ) from error
        samples = token_samples(tokenizer, self.calibration, self.spec.context, self.cancel)
        del tokenizer
        release_memory()  # a vocabulary and a long text take more than some blocks
        return samples

    def settings(self, samples: Samples) -> dict[str, Any]:
        """Everything that the resulting bytes depend on."""
        return {
            "version": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "model": self.spec.source.fingerprint,
            "method": self.method.name,
            "options": asdict(self.options),
            "calibration": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        }
