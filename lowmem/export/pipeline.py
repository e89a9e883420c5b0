"""Export a model: write its graphs, verify them against the original, and describe them in a manifest."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lowmem.errors import BadInput, DoesNotFit, Unsupported, file_errors
from lowmem.events import CancelToken, Receipt, Step
from lowmem.export import fused
from lowmem.export.folder import graph_files, write_card, write_companions, write_program
from lowmem.export.request import ExportRequest, check, estimate
from lowmem.fields import arguments, changed
from lowmem.kernels.int8_linear import largest_code
from lowmem.machine.hardware import probe
from lowmem.machine.monitor import PeakMeter, release_memory
from lowmem.messages import msg
from lowmem.models.modules import folder_config
from lowmem.models.source import read_spec, record
from lowmem.runtime.onnx.manifest import PREFILL, Manifest, discard, unfinished
from lowmem.units import format_bytes

FAILED = "failed"


def export_folder(folder: Path, request: ExportRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """Export the model in `folder` as `request` says; the last event is the receipt.

    `request.out` appears once it is complete and verified. A graph that fails the parity check is moved to `failed/` beside it.

    Raises:
        BadInput, DiskFull: see `request.check`.
        DoesNotFit: the estimate exceeds the budget.
        Unsupported: there is no graph for the model, or it fails the parity check, with the figure.
        CorruptModel, OutOfMemory, Cancelled.
    """
    cancel = cancel or CancelToken()
    started = time.perf_counter()
    out, budget = request.out, request.budget
    with file_errors(msg("{out} was not begun", out=out.name)):
        task = _Export(folder, request)
        check(task.spec, request, task.refusal)
    predicted, limit = task.estimate.ram_bytes, task.estimate.limit
    if predicted > limit:
        raise DoesNotFit(
            msg(
                "Exporting {model} is estimated to take {predicted} of RAM, but the budget is {limit}.",
                model=task.spec.name,
                predicted=format_bytes(predicted),
                limit=format_bytes(limit),
            ),
            msg("Raise the budget or choose a smaller model."),
        )
    try:
        with file_errors(msg("{out} was not finished", out=out.name)):
            part = _begun(out)
            with PeakMeter(budget) as meter:
                for step in task.run(part, cancel):
                    meter.check()
                    yield step
            receipt = task.receipt(time.perf_counter() - started, predicted, meter.peak["ram"])
            task.publish(part, receipt)
    finally:
        discard(out)
    yield receipt


def _begun(out: Path) -> Path:
    """The empty folder that becomes `out`."""
    discard(out)
    part = unfinished(out)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        reason = error.strerror or type(error).__name__
        raise BadInput(
            msg("{parent} cannot be written to: {reason}.", parent=out.parent, reason=reason),
            msg("Choose another folder."),
        ) from error
    return part


class _Export:
    """One export: its inputs and its results."""

    def __init__(self, folder: Path, request: ExportRequest) -> None:
        self.folder, self.request, self.options = folder, request, request.options
        self.spec = read_spec(str(folder), encoders=True)
        self.is_encoder = self.spec.encoder
        config = folder_config(folder)
        self.refusal = None if self.is_encoder else fused.refusal(config.get_text_config(decoder=True))
        held = max(probe().runtime_bytes, probe().process_bytes)
        self.estimate = estimate(self.spec, self.options, held, request.budget.limit("ram"), self.refusal)
        self.manifest: Manifest
        self.passed, self.sentence = True, ""

    def run(self, part: Path, cancel: CancelToken) -> Iterator[Step]:
        if not self.estimate.generic:
            from lowmem.export.decoder import write_decoder

            yield from write_decoder(self.folder, part, self.spec, self.options, cancel)
        else:
            from lowmem.export.generic import write_generic

            yield from write_generic(self.folder, part, self.spec.caches, self.options, cancel)
        release_memory()
        if self.options.optimise and self.estimate.generic:
            from lowmem.export.optimise import optimise

            yield from optimise(part, self.folder)
        write_companions(self.folder, part)
        self._describe(part)
        yield from self._verify(part, cancel)

    def _describe(self, part: Path) -> None:
        files = graph_files(part)
        optimised = {}
        if (report := part / "optimised.json").is_file():
            optimised = json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
        kind = "encoder" if self.is_encoder else "decoder" if self.estimate.generic else "fused"
        self.manifest = Manifest(
            model=self.spec.name,
            source=self.source,
            precision=self.options.precision,
            kind=kind,
            files=files,
            weights_bytes=sum(files.values()),
            int8_range=largest_code() if PREFILL in files else 0,
            group_size=self.options.group_size,
            licence=record(self.folder).licence,
            model_tensors=[
                (t.name, t.dtype, list(t.shape), t.nbytes) for t in (() if self.is_encoder else self.spec.tensors)
            ],
            optimised=optimised,
        )
        self.manifest.save(part)

    def _verify(self, part: Path, cancel: CancelToken) -> Iterator[Step]:
        from lowmem.export.parity import check_decoder, check_encoder

        if self.is_encoder:
            parity = yield from check_encoder(self.folder, part, self.options, cancel)
        else:
            parity = yield from check_decoder(self.folder, part, self.spec.stored, self.options, cancel)
        self.passed, self.sentence = parity.passed, parity.sentence()
        self.manifest = replace(self.manifest, parity=parity.as_dict())

    @property
    def source(self) -> str:
        return self.request.source or self.request.model

    def receipt(self, seconds: float, predicted: int, measured: int) -> Receipt:
        generic = (
            ""
            if self.is_encoder or not self.estimate.generic
            else msg("Generic graph: {generic}", generic=self.estimate.generic)
        )
        return Receipt(
            action="export",
            model=self.spec.name,
            precision=self.options.precision,
            device="cpu",
            seconds=seconds,
            predicted={"ram": predicted},
            measured={"ram": measured},
            disk_bytes=sum(self.manifest.files.values()),
            notes=tuple(filter(None, (self.sentence, generic, self.estimate.caution))),
            snippet=_snippet(self.request),
            details={
                "kind": self.manifest.kind,
                "files": self.manifest.files,
                "predicted_bytes": self.estimate.disk_bytes,
                "parity": self.manifest.parity,
                "optimised": self.manifest.optimised,
            },
        )

    def publish(self, part: Path, receipt: Receipt) -> None:
        """
        Raises:
            Unsupported: the parity check failed.
        """
        self.manifest = replace(self.manifest, receipt=receipt.as_dict())
        self.manifest.save(part)
        write_program(part, self.manifest)
        write_card(part, self.manifest, self.sentence)
        if self.passed:
            part.rename(self.request.out)
            return
        out = self.request.out
        failed = out.parent / FAILED / out.name
        shutil.rmtree(failed, ignore_errors=True)
        failed.parent.mkdir(exist_ok=True)
        part.rename(failed)
        raise Unsupported(
            msg(
                "The graph of {model} failed the parity check and cannot be used. {sentence}",
                model=self.spec.name,
                sentence=self.sentence,
            ),
            msg("Choose another precision. The graph is in {folder}.", folder=failed),
        )


def _snippet(request: ExportRequest) -> str:
    return (
        "from pathlib import Path\n"
        "import lowmem\n\n"
        f"options = lowmem.ExportOptions({arguments(changed(request.options))})\n"
        f"budget = lowmem.MemoryBudget({arguments(request.budget.as_dict())})\n"
        f"request = lowmem.ExportRequest({request.model!r}, Path('exported'), options, budget)\n"
        "for event in lowmem.export_model(request):\n"
        "    print(event)\n"
    )
