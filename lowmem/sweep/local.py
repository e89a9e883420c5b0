"""Cells on this machine: each in processes of its own, as many side by side as their predicted peaks allow.

A cell gets an allotment, its predicted peak and an eighth, which its processes may not pass; the allotments of cells that
run side by side never exceed the budget. One whose memory runs out all the same is tried once more with the whole budget.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from lowmem.errors import Cancelled, LowMemError, OutOfMemory
from lowmem.events import CancelToken, Step
from lowmem.machine.budget import MemoryBudget
from lowmem.measure.compare import Setting
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.models.spec import ModelSpec
from lowmem.sweep.estimate import Peaks
from lowmem.sweep.grid import Cell

MARGIN = 1 / 8
"""A cell may pass its prediction by this share; a larger error ends it."""


CLOSING_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Task:
    """A cell that is ready to run, and all that it needs.

    Args:
        work: its model's folder, with the evaluation text and the reference's predictions.
        peaks: None where it could not be planned, which running it will explain.
    """

    cell: Cell
    spec: ModelSpec
    work: Path
    options: MeasureOptions
    peaks: Peaks | None


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a task: a step, a row, or neither when it has to be run again."""

    task: Task
    step: Step | None = None
    row: Row | None = None


def allotment(peaks: Peaks, budget: MemoryBudget) -> MemoryBudget:
    """What a cell with such peaks may hold, on a machine with this budget."""
    enough = {memory: int(peak * (1 + MARGIN)) for memory, peak in peaks.items()}
    return MemoryBudget(enough["ram"], None if budget.vram is None else enough.get("vram", 0))


class LocalPool:
    """Runs tasks in threads that wait for their processes.

    Args:
        budget: bytes for all processes together.
        workers: most cells side by side.
        threads: cores for each.
    """

    def __init__(self, budget: MemoryBudget, workers: int, threads: int, cancel: CancelToken) -> None:
        self.budget, self.workers, self.threads, self.cancel = budget, workers, threads, cancel
        self._running: dict[str, MemoryBudget] = {}
        self._alone: set[str] = set()
        self._threads: list[threading.Thread] = []
        self._reports: SimpleQueue[Report | BaseException] = SimpleQueue()

    def start(self, task: Task) -> bool:
        """Start a task, unless there is no room for it now."""
        allotment = self._allotment(task)
        if self._running and (len(self._running) >= self.workers or not self._fits(allotment)):
            return False
        budget = allotment if self._fits(allotment) else self.budget
        self._running[task.cell.name] = budget
        thread = threading.Thread(target=self._work, args=(task, budget), daemon=True, name="lowmem-cell")
        self._threads.append(thread)
        thread.start()
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
        """Run a task to its end, its steps reported on the way."""
        started, cell = time.perf_counter(), task.cell
        setting = Setting(task.spec, task.work, task.options, budget, self.cancel, self.threads)
        steps = setting.row(cell.variant, cell.is_reference)
        try:
            while True:
                self._reports.put(Report(task, next(steps)))
        except StopIteration as end:
            return Report(task, row=end.value)
        except Cancelled:
            raise
        except (LowMemError, RuntimeError) as error:
            if isinstance(error, OutOfMemory) and budget != self.budget:
                self._alone.add(cell.name)
                return Report(task)
            return Report(task, row=setting.failed(cell.variant, error, time.perf_counter() - started))

    def reports(self, seconds: float) -> list[Report]:
        """What happened, waiting at most `seconds` for something."""
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
        return (
            f"Up to {self.workers} cells ran side by side, each with {self.threads} of the cores: speeds are below those of "
            "a cell alone, which one worker at a time measures."
        )

    def close(self) -> None:
        """Wait for the processes, which the token has ended."""
        for thread in self._threads:
            thread.join(CLOSING_SECONDS)
