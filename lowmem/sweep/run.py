"""Runs a sweep: decides which cell comes next, continues from earlier results, and makes the receipt; a pool runs cells."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from lowmem.datasets.texts import evaluation_text
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.fields import arguments, changed
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware, probe
from lowmem.machine.timing import timed
from lowmem.measure.compare import caveats, with_perplexity_change
from lowmem.measure.estimate import peaks, total_seconds
from lowmem.measure.rows import Row, largest_peaks
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.sweep.grid import Cell, Grid
from lowmem.sweep.local import MARGIN, LocalPool, Report, Task
from lowmem.sweep.table import Table, default_folder, opened, ordered
from lowmem.units import MB

WAIT_SECONDS = 0.2
SMALLEST_CELL_BYTES = 500 * MB


class Pool(Protocol):
    """Where cells run."""

    def start(self, task: Task) -> bool:
        """Start a task if there is room for it now."""
        ...

    def reports(self, seconds: float) -> list[Report]:
        """New reports; waits at most `seconds` for the first."""
        ...

    def close(self) -> None: ...

    def note(self) -> str:
        """A caveat for readers of the speeds, or ""."""
        ...


def sweep(
    grid: Grid,
    folder: Path | None = None,
    *,
    workers: int = 0,
    ray: str = "",
    budget: MemoryBudget | None = None,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Row | Receipt]:
    """Measure every cell of `grid`; yields the rows of earlier runs, new rows as cells finish, and a receipt.

    Args:
        folder: where the table is stored, see `table`; by default a folder derived from the grid.
        workers: most cells to run in parallel; 0 for as many as fit.
        ray: address of a Ray cluster to run the cells on, see `cluster`; "" for this machine.
        budget: for all cells on this machine together; that of the grid, less this process, when None.

    Raises:
        BadInput, ModelNotFound, Offline: a model, the text or the folder is not usable.
        MissingDependency: Ray is requested but not installed.
        Cancelled: within a second; the table is kept, and the same call continues from it.
    """
    cancel = cancel or CancelToken()
    text = evaluation_text(grid.text, cancel)
    specs = {model: read_spec(model) for model in grid.models}
    hardware = probe()
    if budget is None:
        budget = grid.budget.bounded(hardware).for_child_process()
    inner = CancelToken()
    with opened(folder or default_folder(grid, text), grid, text) as table:
        run = _Run(grid, specs, table, hardware, budget)
        pool = _pool(run, workers, ray, inner)
        try:
            yield from run.rows_so_far()
            yield from timed(run.measured(pool, cancel), "sweep", run.seconds() if not ray else None)
        finally:
            inner.set()
            pool.close()


def _pool(run: _Run, workers: int, ray: str, cancel: CancelToken) -> Pool:
    if workers < 0:
        raise BadInput(
            msg("{workers} parallel cells are not possible.", workers=workers),
            msg("Use 1 or more, or 0 for as many as fit."),
        )
    if ray:
        from lowmem.sweep.cluster import RayPool

        return RayPool(ray, workers, cancel)
    most = max(1, min(run.hardware.cores, len(run.pending), workers or run.side_by_side()))
    return LocalPool(run.budget, most, max(1, run.hardware.cores // most), cancel)


class _Run:
    """One run over the cells that are missing in the table."""

    def __init__(
        self, grid: Grid, specs: dict[str, ModelSpec], table: Table, hardware: Hardware, budget: MemoryBudget
    ) -> None:
        self.grid, self.specs, self.table, self.hardware, self.budget = grid, specs, table, hardware, budget
        self.cells = grid.cells()
        self.rows: list[Row] = []
        self.pending = self._missing()
        self._started: dict[Cell, int] = {}

    def _missing(self) -> list[Cell]:
        """Cells without results, and their references if the predictions to compare with are gone."""
        missing = [cell for cell in self.cells if self.table.row(cell) is None]
        models = {cell.model for cell in missing}
        gone = [model for model in models if not (self.table.work(model) / "reference.bin").exists()]
        return [cell for cell in self.cells if cell in missing or (cell.is_reference and cell.model in gone)]

    def side_by_side(self) -> int:
        """How many cells of average size fit into the budget."""
        sizes = [int(found["ram"] * (1 + MARGIN)) for cell in self.pending if (found := self._peaks(cell))]
        average = sum(sizes) // len(sizes) if sizes else SMALLEST_CELL_BYTES
        return self.budget.limit("ram") // max(1, average)

    def _peaks(self, cell: Cell) -> dict[str, int] | None:
        return peaks(self.specs[cell.model], cell.variant, self.grid.options, self.hardware, self.budget)

    def rows_so_far(self) -> Iterator[Row]:
        """Rows of earlier runs."""
        for cell in self.cells:
            if cell not in self.pending and (row := self.table.row(cell)):
                self.rows.append(row)
                yield row

    def seconds(self) -> float | None:
        """The estimated time of the pending cells."""
        cells = ((self.specs[cell.model], cell.variant) for cell in self.pending)
        return total_seconds(cells, self.grid.options, self.hardware, self.budget, "sweep")

    def measured(self, pool: Pool, cancel: CancelToken) -> Iterator[Step | Row | Receipt]:
        """Run the pending cells and finish the table."""
        started = time.perf_counter()
        yield from self.drive(pool, cancel)
        self.table.finish()
        yield self.receipt(time.perf_counter() - started, pool.note())

    def drive(self, pool: Pool, cancel: CancelToken) -> Iterator[Step | Row]:
        """Run the pending cells. A model's cells wait until its reference has finished or failed."""
        waiting = list(self.pending)
        while waiting or self._started:
            cancel.check()
            for cell in list(waiting):
                if self._ready(cell, waiting) and pool.start(self._task(cell)):
                    waiting.remove(cell)
                    self._started[cell] = 0
            for report in pool.reports(WAIT_SECONDS):
                cell = report.task.cell
                if report.step is not None:
                    self._started[cell] = report.step.done
                    yield self._step(f"{cell.name}: {report.step.note}")
                    continue
                del self._started[cell]
                if report.row is None:
                    waiting.insert(0, cell)
                    yield self._step(msg("{cell}: running again with the whole budget", cell=cell.name))
                else:
                    yield self._finished(cell, report.row, waiting)

    def _ready(self, cell: Cell, waiting: Sequence[Cell]) -> bool:
        others = (*waiting, *self._started)
        return cell.is_reference or not any(other.is_reference and other.model == cell.model for other in others)

    def _task(self, cell: Cell) -> Task:
        return Task(cell, self.specs[cell.model], self.table.work(cell.model), self.grid.options, self._peaks(cell))

    def _finished(self, cell: Cell, row: Row, waiting: Sequence[Cell]) -> Row:
        first = next((r for r in self.rows if (r.model, r.variant) == (cell.model, self.grid.reference.name)), row)
        row = with_perplexity_change(replace(row, model=cell.model), first)
        self.table.add(row)
        self.rows = [one for one in self.rows if (one.model, one.variant) != (row.model, row.variant)] + [row]
        if not any(other.model == cell.model for other in (*waiting, *self._started)):
            self.table.clear(cell.model)
        return row

    def _step(self, note: str) -> Step:
        done, count = len(self.rows), len(self.cells)
        share = min(100 * done + sum(self._started.values()), 100 * count)
        return Step(share, 100 * count, msg("{done} of {count} done. {note}", done=done, count=count, note=note), "%")

    def receipt(self, seconds: float, note: str) -> Receipt:
        rows = ordered(self.rows, self.cells)
        predicted, measured = largest_peaks(rows)
        said = dict.fromkeys(
            said for spec in self.specs.values() for said in caveats(spec, self.table.text, self.grid.variants)
        )
        failed = (f"{row.model} {row.variant}: {row.error}" for row in rows if row.error)
        return Receipt(
            action="sweep",
            model=", ".join(self.grid.models),
            precision=", ".join(variant.name for variant in self.grid.variants),
            device=self.hardware.device.key,
            seconds=seconds,
            predicted=predicted,
            measured=measured,
            notes=(*said, *filter(None, [note]), *failed),
            snippet=_snippet(self.grid, self.budget),
            details={"folder": str(self.table.folder), **self.table.conditions, "rows": [asdict(row) for row in rows]},
        )


def _snippet(grid: Grid, budget: MemoryBudget) -> str:
    return (
        "import lowmem\n"
        "from lowmem.measure.options import MeasureOptions\n"
        "from lowmem.measure.variants import parse_variant, parse_variants\n"
        "from lowmem.sweep.grid import Grid\n"
        "from lowmem.sweep.run import sweep\n\n"
        "grid = Grid(\n"
        f"    models={grid.models!r},\n"
        f"    variants=tuple(parse_variants({[variant.name for variant in grid.variants]!r})),\n"
        f"    reference=parse_variant({grid.reference.name!r}),\n"
        f"    text={grid.text!r},\n"
        f"    options=MeasureOptions({arguments(changed(grid.options))}),\n"
        ")\n"
        f"budget = lowmem.MemoryBudget({arguments(budget.as_dict())})\n"
        "for event in sweep(grid, budget=budget):\n"
        "    print(event)\n"
    )
