"""Runs cells on this machine, each in processes of its own, as many in parallel as their estimated peaks allow.

A cell's allotment is its estimated peak plus `MARGIN`, which its processes may not exceed; the allotments of parallel cells
never exceed the budget. A cell that still runs out of memory is tried once more with the whole budget.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from lowmem.background import in_background
from lowmem.errors import Cancelled, LowMemError, OutOfMemory
from lowmem.events import CancelToken, Step, drain
from lowmem.machine.budget import MemoryBudget
from lowmem.measure.compare import Comparison
from lowmem.measure.estimate import Peaks
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec
from lowmem.sweep.grid import Cell

MARGIN = 1 / 8
"""Share by which a cell may exceed its estimate before it is stopped."""

CLOSING_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Task:
    """A cell that is ready to run.

    Args:
        work: the model's working folder, with the evaluation text and the reference's predictions.
        peaks: estimated peaks; None if it could not be planned, which running it will report.
    """

    cell: Cell
    spec: ModelSpec
    work: Path
    options: MeasureOptions
    peaks: Peaks | None


@dataclass(frozen=True, slots=True)
class Report:
    """News of a task: a step, a row, or neither if it has to run again."""

    task: Task
    step: Step | None = None
    row: Row | None = None


def allotment(peaks: Peaks, budget: MemoryBudget) -> MemoryBudget:
    """The memory that a cell with these peaks may use, on a machine with this budget."""
    enough = {memory: int(peak * (1 + MARGIN)) for memory, peak in peaks.items()}
    return MemoryBudget(enough["ram"], None if budget.vram is None else enough.get("vram", 0))


class LocalPool:
    """Runs tasks in threads that wait for the tasks' processes.

    Args:
        budget: for all processes together.
        workers: most cells to run in parallel.
        threads: cores per cell.
    """

    def __init__(self, budget: MemoryBudget, workers: int, threads: int, cancel: CancelToken) -> None:
        self.budget, self.workers, self.threads, self.cancel = budget, workers, threads, cancel
        self._running: dict[str, MemoryBudget] = {}
        self._alone: set[str] = set()
        self._cells: list[Future[None]] = []
        self._reports: SimpleQueue[Report | BaseException] = SimpleQueue()

    def start(self, task: Task) -> bool:
        """Start a task if there is room for it now."""
        allotment = self._allotment(task)
        if self._running and (len(self._running) >= self.workers or not self._fits(allotment)):
            return False
        budget = allotment if self._fits(allotment) else self.budget
        self._running[task.cell.name] = budget
        self._cells.append(in_background(self._work, task, budget))
        return True

    def _allotment(self, task: Task) -> MemoryBudget:
        if task.peaks is None or task.cell.name in self._alone:
            return self.budget
        return allotment(task.peaks, self.budget)

    def _fits(self, allotment: MemoryBudget) -> bool:
        used = [budget.as_dict() for budget in (*self._running.values(), allotment)]
        return all(sum(one.get(memory, 0) for one in used) <= limit for memory, limit in self.budget.as_dict().items())

    def _work(self, task: Task, budget: MemoryBudget) -> None:
        try:
            self._reports.put(self._report(task, budget))
        except Cancelled:
            pass
        except BaseException as error:
            self._reports.put(error)

    def _report(self, task: Task, budget: MemoryBudget) -> Report:
        """Run a task to its end, reporting its steps."""
        started, cell = time.perf_counter(), task.cell
        comparison = Comparison(task.spec, task.work, task.options, budget, self.cancel, self.threads)
        steps = comparison.row(cell.variant, cell.is_reference)
        try:
            return Report(task, row=drain(steps, lambda step: self._reports.put(Report(task, step))))
        except Cancelled:
            raise
        except (LowMemError, RuntimeError) as error:
            if isinstance(error, OutOfMemory) and budget != self.budget:
                self._alone.add(cell.name)
                return Report(task)
            return Report(task, row=comparison.failed_row(cell.variant, error, time.perf_counter() - started))

    def reports(self, seconds: float) -> list[Report]:
        """New reports; waits at most `seconds` for the first."""
        gathered: list[Report] = []
        try:
            while True:
                report = self._reports.get(timeout=0 if gathered else seconds)
                if isinstance(report, BaseException):
                    raise report
                if report.step is None:
                    del self._running[report.task.cell.name]
                gathered.append(report)
        except Empty:
            return gathered

    def note(self) -> str:
        if self.workers == 1:
            return ""
        return msg(
            "Up to {workers} cells ran in parallel with {threads} cores each, so speeds are lower than those of a cell on its own. Use one worker to measure those.",
            workers=self.workers,
            threads=self.threads,
        )

    def close(self) -> None:
        """Wait for the processes, which end when the token is set."""
        wait(self._cells, CLOSING_SECONDS)
