"""A model quantized block by block, never held as a whole: read, quantized, written, forgotten.

Calibrated methods see each layer's inputs as they are once everything before it is quantized, so what went wrong
before is known to the layers that follow. After every block the journal says how far the work is; a
killed run goes on from there and ends with the same bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from lowmem.errors import DiskFull
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.monitor import PeakMeter
from lowmem.models.source import record
from lowmem.quant.base import Options, Quantizer
from lowmem.quant.calibration import Calibration
from lowmem.quant.job import Job
from lowmem.quant.journal import Journal, check_output, opened, publish
from lowmem.quant.saving import quantization_config, write_card, write_companions
from lowmem.quant.stream import Stream


def quantize_model(
    folder: Path,
    out: Path,
    method: Quantizer,
    options: Options,
    calibration: Calibration,
    *,
    device: str = "cpu",
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """Quantize the model in `folder` into the new folder `out`; the last event is the receipt.

    An unfinished run with the same arguments is continued; `out` appears once it is complete.

    Args:
        options: of `method.Options`.
        calibration: ignored by methods that need none.
        device: where blocks are computed: "cpu", "cuda:0".
        budget: for this process, with what it holds already.

    Raises:
        Unsupported, BadInput: the model or the options cannot be quantized; `out` is there already.
        DiskFull, DoesNotFit: known before the work begins.
        CorruptModel: weights that are not numbers, an unfinished folder that is damaged.
        OutOfMemory: the limit was passed. Cancelled: within a second.
    """
    job = Job.make(folder, method, options, calibration, device, cancel or CancelToken())
    check_output(out)
    job.check_room(out, budget)
    samples = job.samples()
    with PeakMeter(budget) as meter, opened(out, job.settings(samples)) as (part, journal):
        resumed = journal.blocks
        try:
            for step in Stream(job, part, journal, samples).run():
                meter.check()
                yield step
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFull(
                f"The disk is full: {out.name} is unfinished at block {journal.blocks + 1}.",
                "Free some space and start again; what is done is kept.",
            ) from error
        write_companions(folder, part, quantization_config(method, options))
        receipt = _receipt(job, part, journal, meter.peak, resumed)
        _write_card(job, part, receipt)
        publish(part, out)
    yield receipt


def _receipt(job: Job, part: Path, journal: Journal, peak: dict[str, int], resumed: int) -> Receipt:
    size = sum(file.stat().st_size for file in part.glob("*.safetensors"))
    options, losses = job.options, journal.losses
    groups = "one group a row" if options.group_size == -1 else f"groups of {options.group_size}"
    return Receipt(
        action="quantize",
        model=job.spec.name,
        precision=f"{job.method.label}, {options.bits} bits, {groups}",
        device=str(job.device),
        seconds=journal.seconds,
        predicted={"ram": job.estimate.ram_bytes},
        measured={"ram": peak["ram"]},
        disk_bytes=size,
        notes=tuple(_notes(options, resumed)),
        snippet=_snippet(job),
        details={
            "method": job.method.name,
            "bits": options.bits,
            "group_size": options.group_size,
            "original_bytes": job.spec.size_on_disk,
            "quantized_bytes": size,
            "predicted_bytes": job.estimate.output_bytes,
            "bits_per_weight": job.estimate.bits_per_weight,
            "loss": sum(losses.values()) / max(1, len(losses)),
            "losses": losses,
            "resumed_blocks": resumed,
        },
    )


def _notes(options: Options, resumed: int) -> Iterator[str]:
    if options.bits == 2:
        yield "Two bits are an experiment: most models of this size stop making sense."
    if resumed:
        yield f"The first {resumed} blocks are from an earlier run."


def _snippet(job: Job) -> str:
    changed = [f for f in fields(job.options) if getattr(job.options, f.name) != f.default]
    arguments = ", ".join(f"{f.name}={getattr(job.options, f.name)!r}" for f in changed)
    given = [f for f in fields(job.calibration) if getattr(job.calibration, f.name) != f.default]
    text = ", ".join(f"{f.name}={getattr(job.calibration, f.name)!r}" for f in given)
    return (
        "from pathlib import Path\n"
        "from lowmem.quant import get\n"
        "from lowmem.quant.calibration import Calibration\n"
        "from lowmem.quant.pipeline import quantize_model\n"
        f"method = get({job.method.name!r})\n"
        f"for event in quantize_model(Path({str(job.folder)!r}), Path('quantized'), method, "
        f"method.Options({arguments}), Calibration({text})):\n"
        "    print(event)"
    )


def _write_card(job: Job, part: Path, receipt: Receipt) -> None:
    text = job.calibration
    calibrated_on = f"{text.samples} x {text.length} tokens of {text.text}" if job.method.calibrated else "none"
    write_card(part, receipt, job.options, str(record(job.folder).get("licence") or ""), calibrated_on)
