"""Runs cells on a Ray cluster. Each cell is a task that Ray retries on another machine if its worker dies.

A task carries names, options and the evaluation text; the predictions of the model's reference go through Ray's object
store. It returns the row and, for a reference, its predictions, which this process stores in the sweep's folder. Models
are not sent: every machine downloads them by name (a local folder must exist under the same path on all of them), and
quantized checkpoints are deleted where they were made. Workers need the same version of lowmem as this process.

The peaks estimated here are passed to Ray as its "memory" resource, so that each machine runs as many cells as fit. Its
own limit comes from an estimate on the worker, plus `MARGIN`, as on a single machine. ray is imported when a pool is made.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput, MissingDependency, Unsupported, first_line
from lowmem.events import CancelToken, drain
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import probe
from lowmem.measure.compare import Comparison, workspace
from lowmem.measure.estimate import peaks
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import Variant, parse_variant
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.sweep.local import MARGIN, Report, Task, allotment
from lowmem.version import __version__

if TYPE_CHECKING:
    import numpy as np

MAX_TRIES = 5
"""Attempts at a cell whose workers die before it is given up."""

_INSTALL = msg('Install it: pip install "ray>=2.40".')


def run_cell(task: Mapping[str, Any], reference: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray | None]:
    """Runs on a worker: the row of one cell as a dict and, for a reference, its predictions as uint8 [bytes].

    Args:
        task: "model", "variant", "is_reference", "text", "options", "version".
        reference: predictions to compare with; None for the reference itself, or if it failed.
    """
    import numpy as np

    if task["version"] != __version__:
        raise Unsupported(
            msg(
                "A worker has lowmem {version}, but this machine has {local}.",
                version=__version__,
                local=task["version"],
            ),
            msg("Install the same version on all machines."),
        )
    variant, is_reference = parse_variant(task["variant"]), task["is_reference"]
    spec, options = read_spec(task["model"]), build(MeasureOptions, task["options"])
    with workspace() as work:
        comparison = Comparison(spec, work, options, _budget(spec, variant, options), CancelToken())
        comparison.text.write_text(task["text"], encoding="utf-8")
        if reference is not None:
            reference.tofile(comparison.reference)
        row = drain(comparison.measure(variant, is_reference))
        found = np.fromfile(comparison.reference, np.uint8) if is_reference and comparison.reference.exists() else None
    return asdict(row), found


def _budget(spec: ModelSpec, variant: Variant, options: MeasureOptions) -> MemoryBudget:
    """The memory a cell may use on this machine; all that is free if there is no estimate."""
    hardware = probe()
    free = MemoryBudget.detect(hardware)
    found = peaks(spec, variant, options, hardware, free)
    return free if found is None else allotment(found, free)


class RayPool:
    """Runs tasks on the cluster at `address` ("auto", "host:6379" or "ray://host:10001").

    Args:
        most: cells to run in parallel, 0 for as many as the cluster has room for.

    Raises:
        MissingDependency: Ray is not installed.
        BadInput: no cluster responds at the address.
    """

    def __init__(self, address: str, most: int, cancel: CancelToken) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read while ray is imported
        try:
            import ray
        except ImportError:
            raise MissingDependency(msg("A sweep on a cluster needs Ray, which is not installed."), _INSTALL) from None
        self._ray, self._most, self._cancel = ray, most, cancel
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            raise BadInput(
                msg("No Ray cluster responds at {address}: {reason}", address=address, reason=first_line(error)),
                msg("Start one with ray start --head, or omit --ray."),
            ) from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._largest = max((int(node.get("memory", 0)) for node in nodes), default=0)
        self._gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        self._running: dict[Any, Task] = {}
        self._references: dict[Path, Any] = {}

    def start(self, task: Task) -> bool:
        """Submit a task to Ray, which starts it when a machine has room."""
        if self._most and len(self._running) >= self._most:
            return False
        sent = {
            "model": task.cell.model,
            "variant": task.cell.variant.name,
            "is_reference": task.cell.is_reference,
            "text": (task.work / "text.txt").read_text(encoding="utf-8"),
            "options": asdict(task.options),
            "version": __version__,
        }
        # Never ask for more than the largest machine has, or Ray would wait forever; the worker reports what does not fit.
        wanted = min(int(task.peaks["ram"] * (1 + MARGIN)) if task.peaks else self._largest, self._largest)
        remote = self._ray.remote(run_cell).options(
            num_cpus=1, num_gpus=self._gpus, memory=wanted, max_retries=MAX_TRIES - 1, name=task.cell.name
        )
        self._running[remote.remote(sent, self._reference(task))] = task
        return True

    def _reference(self, task: Task) -> Any:
        """The reference's predictions in the object store; this process owns them, so they survive the death of any worker."""
        import numpy as np

        path = task.work / "reference.bin"
        if task.cell.is_reference or not path.exists():
            return None
        if path not in self._references:
            self._references[path] = self._ray.put(np.fromfile(path, np.uint8))
        return self._references[path]

    def reports(self, seconds: float) -> list[Report]:
        """Reports of finished cells; waits at most `seconds` for the first."""
        self._cancel.check()
        if not self._running:
            time.sleep(seconds)
            return []
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._report(handle, self._running.pop(handle)) for handle in done]

    def _report(self, handle: Any, task: Task) -> Report:
        try:
            row, reference = self._ray.get(handle)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None
        except self._ray.exceptions.RayError as error:
            died = msg("Its worker died {max_tries} times: {reason}", max_tries=MAX_TRIES, reason=first_line(error))
            row, reference = asdict(Row(task.cell.variant.name, error=died)), None
        if reference is not None:
            unfinished = task.work / "reference.part"
            reference.tofile(unfinished)
            unfinished.replace(task.work / "reference.bin")
        return Report(task, row=Row(**row))

    def note(self) -> str:
        return msg(
            "Cells ran on a cluster with one core or one GPU each: compare speeds only between identical machines."
        )

    def close(self) -> None:
        """Cancel running tasks and disconnect from the cluster."""
        for handle in self._running:
            self._ray.cancel(handle, force=True)
        self._ray.shutdown()


def _cause(error: Any) -> Exception:
    """The reason why a task returned no row: another version, a missing folder, lowmem not installed."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    if isinstance(cause, ModuleNotFoundError):
        return Unsupported(
            msg("A package is missing on the cluster's machines: {cause}", cause=cause),
            msg("Install lowmem on all of them."),
        )
    return cause
