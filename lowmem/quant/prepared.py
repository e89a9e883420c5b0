"""One quantization of a local folder: what follows from the request and the model, and whether it can be done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lowmem.errors import CorruptModel, DiskFull, DoesNotFit, first_line, is_out_of_memory
from lowmem.events import CancelToken
from lowmem.machine.hardware import disk_free_bytes, probe
from lowmem.machine.monitor import release_memory
from lowmem.messages import msg
from lowmem.models.blocks import BlockList
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.quant.calibration import Samples, token_samples
from lowmem.quant.estimate import Estimate, estimate_quantization
from lowmem.quant.journal import part_of
from lowmem.quant.layers import check_model, packed_tables, quantized_matrices
from lowmem.quant.request import QuantizeRequest
from lowmem.units import format_bytes
from lowmem.version import __version__


@dataclass(frozen=True)
class PreparedQuantization:
    """A request whose model is in `folder`, with the model's shape and the predicted cost.

    `quantized` names the parameters that are quantized, `tables` those that become packed tables.
    """

    folder: Path
    request: QuantizeRequest
    device: torch.device
    cancel: CancelToken
    spec: ModelSpec
    quantized: frozenset[str]
    tables: frozenset[str]
    estimate: Estimate

    @classmethod
    def prepare(cls, folder: Path, request: QuantizeRequest, cancel: CancelToken) -> PreparedQuantization:
        """Describe the model and check that it can be quantized as requested.

        Raises:
            Unsupported, BadInput: see `check_model`.
        """
        spec = read_spec(str(folder))
        check_model(spec, request)
        hardware = probe()
        device = torch.device(hardware.device.key if hardware.device.kind == "cuda" else "cpu")
        estimate = estimate_quantization(spec, request, hardware.runtime_bytes)
        quantized = frozenset(one.tensor.name for one in quantized_matrices(spec, request.options))
        tables = frozenset(tensor.name for tensor in packed_tables(spec, request.embedding_bits))
        return cls(folder, request, device, cancel, spec, quantized, tables, estimate)

    @property
    def blocks(self) -> BlockList:
        return self.spec.blocks

    def check_room(self) -> None:
        """Check that the quantization fits on the disk and in the memory budget.

        Raises:
            DiskFull, DoesNotFit: naming both numbers.
        """
        out, limit, needed_ram = self.request.out, self.request.budget.limit("ram"), self.estimate.ram_bytes
        part = part_of(out)
        done = sum(file.stat().st_size for file in part.glob("*")) if part.is_dir() else 0
        needed, free = self.estimate.disk_bytes - done, disk_free_bytes(out.absolute().parent)
        if needed > free:
            raise DiskFull(
                msg(
                    "Quantizing {model} needs {needed} of disk space, but only {free} is free.",
                    model=self.spec.name,
                    needed=format_bytes(needed),
                    free=format_bytes(free),
                ),
                msg("Free some space, or choose fewer bits, fewer samples or another disk."),
            )
        if needed_ram > limit:
            raise DoesNotFit(
                msg(
                    "Quantizing {model} with {label} is estimated to take {needed_ram} of RAM, but the budget is {limit}.",
                    model=self.spec.name,
                    label=self.request.method.label,
                    needed_ram=format_bytes(needed_ram),
                    limit=format_bytes(limit),
                ),
                msg("Raise the budget, or choose a method without calibration, which needs less."),
            )

    def samples(self) -> Samples:
        """The calibration text as token ids; empty for methods without calibration.

        Raises:
            BadInput, Offline: see `token_samples`. CorruptModel: the tokenizer cannot be read.
        """
        if not self.request.method.calibrated:
            return ()
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            if is_out_of_memory(error) or getattr(error, "errno", None):  # the system's fault, not the file's
                raise
            raise CorruptModel(
                msg(
                    "The tokenizer in {folder} cannot be read: {error}",
                    folder=self.folder.name,
                    error=first_line(error),
                ),
                msg("Add the model's tokenizer.json."),
            ) from error
        samples = token_samples(tokenizer, self.request.calibration, self.spec.context, self.cancel)
        del tokenizer
        release_memory()  # vocabulary and text can take more than a block
        return samples

    def settings(self, samples: Samples) -> dict[str, Any]:
        """Everything that the resulting bytes depend on: an unfinished run is continued only if all of it matches."""
        return {
            "version": __version__,
            "torch": torch.__version__,
            "device": self.device.type,
            "model": self.spec.source.fingerprint,
            "method": self.request.method.name,
            "options": asdict(self.request.options),
            "embedding_bits": self.request.embedding_bits,
            "calibration": hashlib.sha256(json.dumps(samples).encode()).hexdigest(),
        }
