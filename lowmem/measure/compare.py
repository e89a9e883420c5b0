"""Compares variants of one model: quality, size, speed and memory, each measured in its own child process.

The reference runs first and writes its predictions to a file that the other variants are compared with. A variant that
fails yields a row with the reason, and the comparison continues.
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
from lowmem.events import CancelToken, Receipt, Step, WithResult
from lowmem.fields import arguments, changed
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import probe
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.timing import timed
from lowmem.measure.estimate import total_seconds
from lowmem.measure.options import MeasureOptions
from lowmem.measure.progress import share
from lowmem.measure.rows import Row, largest_peaks
from lowmem.measure.variants import Variant, parse_variant
from lowmem.messages import msg
from lowmem.models import demo
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.quant import get
from lowmem.quant.calibration import overlap_warning
from lowmem.settings import settings

log = logging.getLogger("lowmem.compare")

DEFAULT_OPTIONS = MeasureOptions()

_QUANTIZED = 50
"""Per cent of a quantized variant's work that making the checkpoint counts for."""


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
    """Measure every variant of `ref`; yields rows as they finish, and a receipt with all of them.

    Args:
        text: "manual", "wikitext2" or a file, see `evaluation_text`.
        reference: the variant that the others are compared with; it is always measured, and first.
        budget: of each process; unset limits default to what is free on this machine.

    Raises:
        BadInput, ModelNotFound, Offline: the model or the text is not available.
        Cancelled: within a second; the rows so far have been yielded, and no files are left.
    """
    cancel = cancel or CancelToken()
    spec, chosen = read_spec(ref), evaluation_text(text, cancel)
    ordered = list(dict.fromkeys([parse_variant(reference), *variants]))
    expected = total_seconds(((spec, one) for one in ordered), options, probe(), budget, "compare")
    repeat = _snippet(ref, ordered, text, reference, options, budget)
    yield from timed(_compare(spec, ordered, chosen, options, budget, cancel, repeat), "compare", expected)


def _compare(
    spec: ModelSpec,
    ordered: Sequence[Variant],
    chosen: Text,
    options: MeasureOptions,
    budget: MemoryBudget,
    cancel: CancelToken,
    snippet: str,
) -> Iterator[Step | Row | Receipt]:
    rows: list[Row] = []
    started = time.perf_counter()
    with workspace() as work:
        comparison = Comparison(spec, work, options, budget, cancel)
        comparison.text.write_text(chosen.text, encoding="utf-8")
        for index, variant in enumerate(ordered):
            part = comparison.measure(variant, is_reference=index == 0)
            row = yield from _within(part, variant.name, index, len(ordered))
            rows.append(with_perplexity_change(row, rows[0] if rows else row))
            yield rows[-1]
    notes = (*caveats(spec, chosen, ordered), *(f"{row.variant}: {row.error}" for row in rows if row.error))
    yield _receipt(comparison, chosen, rows, notes, time.perf_counter() - started, snippet)


@dataclass
class Comparison:
    """What the variants of one comparison have in common.

    Args:
        work: working folder for the evaluation text, predictions and checkpoints.
        threads: cores per process, 0 for all.
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
        """File of the reference's predictions, once it has been measured."""
        return self.work / "reference.bin"

    def measure(self, variant: Variant, is_reference: bool) -> Generator[Step, None, Row]:
        """Measure one variant; returns its row even if it fails."""
        started = time.perf_counter()
        try:
            return (yield from self.row(variant, is_reference))
        except Cancelled:
            raise
        except (LowMemError, RuntimeError) as error:
            return self.failed_row(variant, error, time.perf_counter() - started)

    def failed_row(self, variant: Variant, error: Exception, seconds: float) -> Row:
        """The row of a variant that failed with `error` after `seconds`."""
        reason = str(error)
        if not isinstance(error, LowMemError):
            log.error("measuring %s failed", variant.name, exc_info=error)
            reason = msg("Unexpected error: {error}", error=(reason.strip().splitlines() or [""])[-1][:300])
        return Row(variant.name, error=reason, seconds=seconds, model=self.spec.ref)

    def row(self, variant: Variant, is_reference: bool) -> Generator[Step, None, Row]:
        """Make and measure one variant; returns its row.

        Raises:
            LowMemError: making or measuring it failed. RuntimeError: a bug.
        """
        if variant.precision:
            done = yield from self._run_measurement(self.spec.ref, variant.precision, is_reference)
            return self._finished(variant, done)
        folder = self.work / variant.name.replace(":", "-")
        shutil.rmtree(folder, ignore_errors=True)  # left by a killed run; an unfinished checkpoint has another name
        try:
            made = yield from share(self._run_quantization(variant, folder), 0, _QUANTIZED)
            done = yield from share(self._run_measurement(str(folder), "stored", is_reference), _QUANTIZED, 100)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        row = self._finished(variant, done)
        return replace(
            row,
            seconds=made.seconds + done.seconds,
            bits_per_quantized_weight=made.value["details"]["bits_per_quantized_weight"],
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
            bits_per_parameter=8 * figures["weight_bytes"] / self.spec.parameters,
            ram_bytes=done.peak_bytes.get("ram"),
            vram_bytes=done.peak_bytes.get("vram") if figures["predicted_vram_bytes"] else None,
            seconds=done.seconds,
            model=self.spec.ref,
            **figures,
        )

    def _run_measurement(self, ref: str, precision: str, is_reference: bool) -> Generator[Step, None, Finished]:
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

    def _run_quantization(self, variant: Variant, folder: Path) -> Generator[Step, None, Finished]:
        request = replace(variant.request(self.spec.ref, folder, self.budget), restart=True)  # the folder is temporary
        return (yield from self._isolated("quantize", request.as_dict() | {"threads": self.threads}))

    def _isolated(self, job: str, arguments: dict[str, Any]) -> Generator[Step, None, Finished]:
        for event in run_isolated(job, arguments, self.cancel, self.budget):
            if isinstance(event, Finished):
                return event
            yield event
        raise RuntimeError("a job ended without a result")


def _within(steps: Generator[Step, None, Row], name: str, index: int, count: int) -> Generator[Step, None, Row]:
    """Turn the steps of one variant into steps of the comparison."""
    running = WithResult(steps)
    for step in running:
        yield Step(
            100 * index + step.done,
            100 * count,
            msg("{name} ({index} of {count}): {note}", name=name, index=index + 1, count=count, note=step.note),
            "%",
        )
    return running.result


def with_perplexity_change(row: Row, reference: Row) -> Row:
    """`row` with its change in perplexity relative to the reference."""
    if row.perplexity is None or not reference.perplexity:
        return row
    return replace(row, perplexity_change=row.perplexity / reference.perplexity - 1)


def caveats(spec: ModelSpec, text: Text, variants: Sequence[Variant]) -> Iterator[str]:
    """What readers of the results should know."""
    methods = {variant.method for variant in variants if variant.method}
    if any(get(method).calibrated for method in methods) and (
        warning := overlap_warning(calibration_text().text, text.text)
    ):
        yield warning
    if methods and spec.source.detail == demo.DETAIL:
        yield msg(
            "The source was 4-bit with groups of 32, which the same grouping restores: compare at groups of 64 or 128."
        )


def _receipt(
    comparison: Comparison, text: Text, rows: Sequence[Row], notes: tuple[str, ...], seconds: float, snippet: str
) -> Receipt:
    predicted, measured = largest_peaks(rows)
    return Receipt(
        action="compare",
        model=comparison.spec.name,
        precision=", ".join(row.variant for row in rows),
        device=comparison.device,
        seconds=seconds,
        predicted=predicted,
        measured=measured,
        notes=notes,
        snippet=snippet,
        details={"text": text.name, **asdict(comparison.options), "rows": [asdict(row) for row in rows]},
    )


def _snippet(
    ref: str,
    variants: Sequence[Variant],
    text: str | Path,
    reference: str,
    options: MeasureOptions,
    budget: MemoryBudget,
) -> str:
    return (
        "import lowmem\n"
        "from lowmem.measure.compare import compare\n"
        "from lowmem.measure.options import MeasureOptions\n"
        "from lowmem.measure.variants import parse_variants\n\n"
        f"variants = parse_variants({[variant.name for variant in variants]!r})\n"
        f"options = MeasureOptions({arguments(changed(options))})\n"
        f"budget = lowmem.MemoryBudget({arguments(budget.as_dict())})\n"
        f"for event in compare({ref!r}, variants, {str(text)!r}, reference={reference!r}, options=options, budget=budget):\n"
        "    print(event)\n"
    )


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder for the reference's predictions and for checkpoints.

    It is next to the models, because the system's temporary folder may be in RAM. Folders left by dead processes of
    this machine are removed.
    """
    import psutil

    host = hashlib.sha256(platform.node().encode()).hexdigest()[:8]  # machines of a cluster may share this folder
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
