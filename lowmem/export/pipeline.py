"""From a model's folder to a folder of graphs: written, proven, described; a graph that fails its proof is kept apart."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from lowmem.errors import BadInput, DiskFull, DoesNotFit, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.export import fused
from lowmem.export.folder import graph_files, write_card, write_companions, write_program
from lowmem.fields import changed
from lowmem.kernels.int8_linear import largest_code
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import disk_free_bytes, probe
from lowmem.machine.monitor import PeakMeter, release_memory
from lowmem.models.config import is_encoder
from lowmem.models.source import read_spec, record
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.graph_options import ExportOptions
from lowmem.runtime.onnx.manifest import PREFILL, Manifest, discard, unfinished
from lowmem.units import format_bytes

FAILED = "failed"


def export_model(
    folder: Path,
    out: Path,
    options: ExportOptions,
    *,
    ref: str = "",
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """Export the model in `folder` into the new folder `out`; the last event is the receipt.

    `out` appears once it is complete and proven. What fails its proof is left in `failed/` beside it.

    Args:
        ref: what the model was asked for by, for the card; the folder when left out.
        budget: for this process, with what it holds already.

    Raises:
        BadInput: `out` is there already, or a precision that does not go with the model.
        Unsupported: there is no graph for it, or it fails its proof, with the figure.
        DiskFull, DoesNotFit: known before the work begins. CorruptModel, OutOfMemory, Cancelled.
    """
    cancel = cancel or CancelToken()
    started = time.perf_counter()
    job = _Job.make(folder, out, options, ref or str(folder))
    predicted = job.predicted_ram()
    if predicted > (limit := budget.limit("ram")):
        raise DoesNotFit(
            f"Exporting {job.name} is predicted to take {format_bytes(predicted)} of RAM, the budget is {format_bytes(limit)}.",
            "Raise the budget or choose a smaller model.",
        )
    try:
        part = _begun(out)
        with PeakMeter(budget) as meter:
            for step in job.run(part, cancel):
                meter.check()
                yield step
        receipt = job.receipt(time.perf_counter() - started, predicted, meter.peak["ram"])
        job.publish(part, receipt)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"The disk is full; {out.name} was not finished.", "Free some space, or choose fewer bits."
        ) from error
    finally:
        discard(out)
    yield receipt


def _begun(out: Path) -> Path:
    """The empty folder in which `out` grows."""
    discard(out)
    part = unfinished(out)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        reason = error.strerror or type(error).__name__
        raise BadInput(f"{out.parent} cannot hold an export: {reason}.", "Choose a folder you may write to.") from error
    return part


class _Job:
    """One export: what is known before, and what has come of it."""

    def __init__(self, folder: Path, out: Path, options: ExportOptions, ref: str, spec: ModelSpec | None) -> None:
        self.folder, self.out, self.options, self.ref, self.spec = folder, out, options, ref, spec
        self.name = spec.name if spec else str(record(folder).get("name") or folder.resolve().name)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.fused_refusal = (
            "It is an encoder." if spec is None else fused.refusal(config.get_text_config(decoder=True))
        )
        if not options.fused:
            self.fused_refusal = self.fused_refusal or "Standard operators were asked for."
        self.shape = spec or read_spec(str(folder), encoders=True)
        self.manifest: Manifest
        self.passed, self.sentence = True, ""

    @classmethod
    def make(cls, folder: Path, out: Path, options: ExportOptions, ref: str) -> _Job:
        if out.exists():
            raise BadInput(f"{out} is there already.", "Choose another name, or delete it first.")
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        spec = None if is_encoder(config.model_type) else read_spec(str(folder))
        job = cls(folder, out, options, ref, spec)
        job.check()
        return job

    def check(self) -> None:
        options, spec = self.options, self.spec
        if self.shape.exported:
            raise BadInput(f"{self.name} is an exported graph already.", "Choose the model it came from.")
        if self.fused_refusal and spec is not None and spec.quantization:
            raise Unsupported(
                f"{self.name} is quantized with {spec.quantization}, and only fused graphs take codes over. {self.fused_refusal}",
                "Export the original model.",
            )
        if spec is not None and spec.quantization and options.precision in ("fp32", "fp16"):
            raise BadInput(
                f"{self.name} is quantized: a graph in {options.precision} would only be larger.",
                "Choose int4 or int8.",
            )
        if spec is not None and not self.fused_refusal and options.precision == "int4" and not spec.quantization:
            widths = {columns for _, columns in exported.matrix_shapes(spec)}
            if odd := [width for width in sorted(widths) if width % options.group_size]:
                raise BadInput(
                    f"Groups of {options.group_size} do not divide layers of {odd[0]:,} inputs.",
                    "Choose groups of 16 or 32.",
                )
        needed, free = self.disk_bytes(), disk_free_bytes(self.out.absolute().parent)
        if self.fused_refusal and options.precision != "fp32":  # the traced graph, which is converted
            needed += exported.generic_bytes(self.shape, "fp32")
        if self.fused_refusal and options.optimise:  # beside the graph as it was
            needed += self.disk_bytes()
        if needed > free:
            raise DiskFull(
                f"Exporting {self.name} needs {format_bytes(needed)} of disk, {format_bytes(free)} are free.",
                "Free some space, or choose fewer bits.",
            )

    def disk_bytes(self) -> int:
        if self.spec is None or self.fused_refusal:
            return exported.generic_bytes(self.shape, self.options.precision, self.options.group_size)
        return exported.disk_bytes(self.spec, self.options.precision, self.options.group_size, self.options.has_prefill)

    def predicted_ram(self) -> int:
        runtime = max(probe().runtime_bytes, probe().process_bytes)
        if self.spec is None or self.fused_refusal:
            return runtime + exported.tracing_bytes(
                self.shape, self.options.precision, self.options.group_size, self.options.optimise
            )
        options = self.options
        return runtime + exported.writing_bytes(self.spec, options.precision, options.group_size, options.has_prefill)

    def run(self, part: Path, cancel: CancelToken) -> Iterator[Step]:
        if self.spec is not None and not self.fused_refusal:
            from lowmem.export.decoder import write_decoder

            yield from write_decoder(self.folder, part, self.spec, self.options, cancel)
        else:
            from lowmem.export.generic import write_generic

            yield from write_generic(self.folder, part, self.options, cancel)
        release_memory()
        if self.options.optimise and self.fused_refusal:
            from lowmem.export.optimise import optimise

            yield from optimise(part, self.folder)
        write_companions(self.folder, part)
        self._describe(part)
        yield from self._prove(part, cancel)

    def _describe(self, part: Path) -> None:
        files = graph_files(part)
        source = record(self.folder)
        optimised = {}
        if (report := part / "optimised.json").is_file():
            optimised = json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
        kind = "encoder" if self.spec is None else "decoder" if self.fused_refusal else "fused"
        self.manifest = Manifest(
            model=self.name,
            source=self.ref,
            precision=self.options.precision,
            kind=kind,
            files=files,
            weights_bytes=sum(files.values()),
            int8_range=largest_code() if PREFILL in files else 0,
            licence=str(source.get("licence") or ""),
            model_tensors=[
                [t.name, t.dtype, list(t.shape), t.nbytes] for t in (self.spec.tensors if self.spec else ())
            ],
            optimised=optimised,
        )
        self.manifest.save(part)

    def _prove(self, part: Path, cancel: CancelToken) -> Iterator[Step]:
        from lowmem.export.prove import prove, prove_encoder

        if self.spec is None:
            proof = yield from prove_encoder(self.folder, part, self.options.precision)
        else:
            proof = yield from prove(self.folder, part, self.spec.stored, cancel)
        self.passed, self.sentence = proof.passed, proof.sentence()
        self.manifest = replace(self.manifest, proof=proof.as_dict())

    def receipt(self, seconds: float, predicted: int, measured: int) -> Receipt:
        caution = exported.caution(self.shape, self.options.precision, fused=not self.fused_refusal)
        return Receipt(
            action="export",
            model=self.name,
            precision=self.options.precision,
            device="cpu",
            seconds=seconds,
            predicted={"ram": predicted},
            measured={"ram": measured},
            disk_bytes=sum(self.manifest.files.values()),
            notes=tuple(filter(None, (self.sentence, self._generic_note(), caution))),
            snippet=_snippet(self.ref, self.options),
            details={
                "kind": self.manifest.kind,
                "files": self.manifest.files,
                "predicted_bytes": self.disk_bytes(),
                "proof": self.manifest.proof,
                "optimised": self.manifest.optimised,
            },
        )

    def _generic_note(self) -> str:
        return f"A generic graph: {self.fused_refusal}" if self.fused_refusal and self.spec is not None else ""

    def publish(self, part: Path, receipt: Receipt) -> None:
        """
        Raises:
            Unsupported: the proof failed; the folder is kept apart.
        """
        self.manifest = replace(self.manifest, receipt=receipt.as_dict())
        self.manifest.save(part)
        write_program(part, self.manifest)
        write_card(part, self.manifest, self.sentence)
        if self.passed:
            part.rename(self.out)
            return
        kept = self.out.parent / FAILED / self.out.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        part.rename(kept)
        raise Unsupported(
            f"The graph of {self.name} failed its proof and is not offered. {self.sentence}",
            f"It is kept in {kept}; choose another precision.",
        )


def _snippet(ref: str, options: ExportOptions) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in changed(options).items())
    return (
        "from pathlib import Path\n"
        "import lowmem\n"
        "from lowmem.planning.graph_options import ExportOptions\n"
        "from lowmem.export.pipeline import export_model\n"
        "from lowmem.models.fetch import fetch\n\n"
        f"*_, = fetch({ref!r})\n"
        f"folder = lowmem.local_folder({ref!r})\n"
        f"for event in export_model(folder, Path('exported'), ExportOptions({arguments})):\n"
        "    print(event)\n"
    )
