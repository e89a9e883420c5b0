"""Variants of one model side by side: quality, size, speed and memory, each in a process of its own.

The reference runs first and leaves its predictions in a file; every other variant is compared with that
file. A variant that fails is a row with the reason, and the others go on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem.datasets.texts import MANUAL, Text, calibration_text, evaluation_text
from lowmem.errors import Cancelled, LowMemError
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.measure.options import MeasureOptions
from lowmem.measure.progress import share
from lowmem.measure.rows import Row
from lowmem.measure.variants import Variant, parse_variant
from lowmem.models import demo
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.quant import get
from lowmem.quant.calibration import overlap_warning
from lowmem.settings import settings

log = logging.getLogger("lowmem.compare")

DEFAULT_OPTIONS = MeasureOptions()

_QUANTIZED = 50
"""Per cent of a quantized variant's work that are done when its checkpoint is there."""


def compare(
    ref: str,
    variants: Sequence[Variant],
    text: str | Path = MANUAL,
    *,
    reference: str = "fp32",
    options: MeasureOptions = DEFAULT_OPTIONS,
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Row | Receipt]:
    """Measure every variant of `ref`; rows come as they finish, a receipt with all of them comes last.

    Args:
        text: "manual", "wikitext2" or a file, see `evaluation_text`.
        reference: the variant that the others are held against; it is measured first in any case.
        budget: for each process; what is free on this machine where it sets no limit.

    Raises:
        BadInput, ModelNotFound, Offline: model or text cannot be had.
        Cancelled: within a second; the rows so far have been yielded, nothing else is left.
    """
    cancel, started = cancel or CancelToken(), time.perf_counter()
    spec, chosen = read_spec(ref), evaluation_text(text, cancel)
    first = parse_variant(reference)
    ordered = list(dict.fromkeys([first, *variants]))
    rows: list[Row] = []
    with workspace() as work:
        setting = Setting(spec, work, options, budget, cancel)
        setting.text.write_text(chosen.text, encoding="utf-8")
        for index, variant in enumerate(ordered):
            part = setting.measured(variant, is_reference=index == 0)
            row = yield from _within(part, variant.name, index, len(ordered))
            rows.append(against(row, rows[0] if rows else row))
            yield rows[-1]
    notes = (*notes_on(spec, chosen, ordered), *(f"{row.variant}: {row.error}" for row in rows if row.error))
    yield _receipt(setting, chosen, rows, notes, time.perf_counter() - started)


@dataclass
class Setting:
    """What all variants of one comparison share.

    Args:
        work: a folder with the evaluation text in `text`, and room for predictions and checkpoints.
        threads: cores for each process, 0 for all.
    """

    spec: ModelSpec
    work: Path
    options: MeasureOptions
    budget: MemoryBudget
    cancel: CancelToken
    threads: int = 0
    device: str = ""

    @property
    def text(self) -> Path:
        return self.work / "text.txt"

    @property
    def reference(self) -> Path:
        """The reference's predictions, once it is measured."""
        return self.work / "reference.bin"

    def measured(self, variant: Variant, is_reference: bool) -> Generator[Step, None, Row]:
        """The row of one variant, of a failed one too."""
        started = time.perf_counter()
        try:
            return (yield from self.row(variant, is_reference))
        except Cancelled:
            raise
        except (LowMemError, RuntimeError) as error:
            return self.failed(variant, error, time.perf_counter() - started)

    def failed(self, variant: Variant, error: Exception, seconds: float) -> Row:
        """The row of a variant that has no figures."""
        reason = str(error)
        if not isinstance(error, LowMemError):
            log.error("measuring %s failed", variant.name, exc_info=error)
            reason = f"Unexpected error: {(reason.strip().splitlines() or [''])[-1][:300]}"
        return Row(variant.name, error=reason, seconds=seconds, model=self.spec.ref)

    def row(self, variant: Variant, is_reference: bool) -> Generator[Step, None, Row]:
        """The row of one variant.

        Raises:
            LowMemError: whatever making or measuring it fails with. RuntimeError: a bug.
        """
        if variant.precision:
            done = yield from self._measure(self.spec.ref, variant.precision, is_reference)
            return self._finished(variant, done)
        folder = self.work / variant.name.replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed; an unfinished one lies beside it
        try:
            made = yield from share(self._quantize(variant, folder), 0, _QUANTIZED)
            done = yield from share(self._measure(str(folder), "stored", is_reference), _QUANTIZED, 100)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        row = self._finished(variant, done)
        return replace(
            row,
            seconds=made.seconds + done.seconds,
            quantize_seconds=made.seconds,
            quantize_ram_bytes=made.peak_bytes.get("ram"),
        )

    def _finished(self, variant: Variant, done: Finished) -> Row:
        figures = dict(done.value)
        self.device = figures.pop("device")
        for name in ("tokens", "window", "stride"):
            figures.pop(name)
        return Row(
            variant=variant.name,
            bits_per_weight=8 * figures["weight_bytes"] / self.spec.parameters,
            ram_bytes=done.peak_bytes.get("ram"),
            vram_bytes=done.peak_bytes.get("vram") if figures["predicted_vram_bytes"] else None,
            seconds=done.seconds,
            model=self.spec.ref,
            **figures,
        )

    def _measure(self, ref: str, precision: str, is_reference: bool) -> Generator[Step, None, Finished]:
        arguments = {
            "ref": ref,
            "precision": precision,
            "text": str(self.text),
            "reference": str(self.reference),
            "is_reference": is_reference,
            "options": asdict(self.options),
            "budget": self.budget.as_dict(),
            "threads": self.threads,
        }
        return (yield from self._isolated("measure_variant", arguments))

    def _quantize(self, variant: Variant, folder: Path) -> Generator[Step, None, Finished]:
        request = variant.request(self.spec.ref, folder, self.budget)
        return (yield from self._isolated("quantize", request.as_dict() | {"threads": self.threads}))

    def _isolated(self, job: str, arguments: dict[str, Any]) -> Generator[Step, None, Finished]:
        for event in run_isolated(job, arguments, self.cancel, self.budget):
            if isinstance(event, Finished):
                return event
            yield event
        raise RuntimeError("a job ended without a result")


def _within(steps: Generator[Step, None, Row], name: str, index: int, count: int) -> Generator[Step, None, Row]:
    """Steps of one variant as steps of the comparison."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            return end.value
        yield Step(100 * index + step.done, 100 * count, f"{name} ({index + 1} of {count}): {step.note}", "%")


def against(row: Row, reference: Row) -> Row:
    """`row` with its change of perplexity."""
    if row.perplexity is None or not reference.perplexity:
        return row
    return replace(row, perplexity_change=row.perplexity / reference.perplexity - 1)


def notes_on(spec: ModelSpec, text: Text, variants: Sequence[Variant]) -> Iterator[str]:
    """What a reader of the figures should know."""
    methods = {variant.method for variant in variants if variant.method}
    if any(get(method).calibrated for method in methods) and (
        warning := overlap_warning(calibration_text().text, text.text)
    ):
        yield warning
    if methods and spec.source.detail == demo.DETAIL:
        yield "These weights were once rounded to 4 bits in groups of 32: groups of 32 restore them, judge 64 or 128."


def _receipt(setting: Setting, text: Text, rows: Sequence[Row], notes: tuple[str, ...], seconds: float) -> Receipt:
    worst = max(rows, key=lambda row: row.peak_bytes or 0)
    memory = "ram" if worst.predicted_vram_bytes is None else "vram"
    names = ",".join(row.variant for row in rows)
    return Receipt(
        action="compare",
        model=setting.spec.name,
        precision=", ".join(row.variant for row in rows),
        device=setting.device,
        seconds=seconds,
        predicted={memory: worst.predicted_bytes} if worst.predicted_bytes else {},
        measured={memory: worst.peak_bytes} if worst.peak_bytes else {},
        notes=notes,
        snippet=(
            "from lowmem.measure.compare import compare\n"
            "from lowmem.measure.variants import parse_variants\n\n"
            f"for event in compare({setting.spec.ref!r}, parse_variants({names!r})):\n"
            "    print(event)\n"
        ),
        details={"text": text.name, **asdict(setting.options), "rows": [asdict(row) for row in rows]},
    )


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for the reference's predictions and for checkpoints.

    It is beside the models, since a system's folder for temporary files may lie in memory. What
    processes of this machine that are no more have left there is removed.
    """
    import psutil

    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # machines of a cluster may share the folder
    root = settings().home / "work"
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"compare-*-{host}-*"):
        owner = left.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=f"compare-{os.getpid()}-{host}-", dir=root, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
