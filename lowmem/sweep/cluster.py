"""Cells on a Ray cluster: the same cells, each a task that Ray retries on another machine when its worker dies.

What a cell needs travels with it: names, options, the evaluation text, and through Ray's object store the predictions of
the model's reference. What comes back is the row, and from a reference its predictions, which are kept in the sweep's own
folder. Models do not travel: every machine fetches them by name (a folder must be there under the same path), and quantized
checkpoints stay, and end, where they are made. Workers must be able to import lowmem, in the version of this process.

Ray counts the peaks that this machine predicts as its "memory", so that a machine takes as many cells as fit; there each
cell keeps to what its own machine predicts, and an eighth, as on one machine. Imports ray only when a pool is made.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.errors import BadInput, MissingDependency, Unsupported
from lowmem.events import CancelToken
from lowmem.fields import build
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import probe
from lowmem.measure.compare import Setting, workspace
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import Variant, parse_variant
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.sweep.estimate import peaks
from lowmem.sweep.local import MARGIN, Report, Task, allotment
from lowmem.version import __version__

if TYPE_CHECKING:
    import numpy as np

MOST_TRIES = 5
"""A cell whose worker died so often is given up."""

_INSTALL = 'Install it: pip install "ray>=2.40".'


def run_cell(task: Mapping[str, Any], reference: np.ndarray | None) -> tuple[dict[str, Any], np.ndarray | None]:
    """On a worker: the row of one cell as a dict, and the predictions of a reference, bytes as uint8 [n].

    Args:
        task: "model", "variant", "is_reference", "text", "options", "version".
        reference: predictions to compare with; None for the reference itself, or where it failed.
    """
    import numpy as np

    if task["version"] != __version__:
        raise Unsupported(
            f"A worker has lowmem {__version__}, this machine {task['version']}.", "Install the same everywhere."
        )
    variant, is_reference = parse_variant(task["variant"]), task["is_reference"]
    spec, options = read_spec(task["model"]), build(MeasureOptions, task["options"])
    with workspace() as work:
        setting = Setting(spec, work, options, _budget(spec, variant, options), CancelToken())
        setting.text.write_text(task["text"], encoding="utf-8")
        if reference is not None:
            reference.tofile(setting.reference)
        row = _drained(setting, variant, is_reference)
        found = np.fromfile(setting.reference, np.uint8) if is_reference and setting.reference.exists() else None
    return asdict(row), found


def _budget(spec: ModelSpec, variant: Variant, options: MeasureOptions) -> MemoryBudget:
    """What a cell may hold here; all that is free where it cannot be planned."""
    hardware = probe()
    free = MemoryBudget.detect(hardware)
    found = peaks(spec, variant, options, hardware, free)
    return free if found is None else allotment(found, free)


def _drained(setting: Setting, variant: Variant, is_reference: bool) -> Row:
    steps = setting.measured(variant, is_reference)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class RayPool:
    """Runs tasks on the cluster at `address` ("auto", "host:6379" or "ray://host:10001").

    Args:
        most: cells side by side, 0 for as many as the cluster takes.

    Raises:
        MissingDependency: Ray is not installed.
        BadInput: no cluster answers there.
    """

    def __init__(self, address: str, most: int, cancel: CancelToken) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read while ray is imported
        try:
            import ray
        except ImportError:
            raise MissingDependency("A sweep on a cluster needs Ray, which is not installed.", _INSTALL) from None
        self._ray, self._most, self._cancel = ray, most, cancel
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=False)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BadInput(
                f"No Ray cluster answers at {address}: {reason}", "Start one with ray start --head, or leave out --ray."
            ) from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._largest = max((int(node.get("memory", 0)) for node in nodes), default=0)
        self._gpus = 1 if any(node.get("GPU") for node in nodes) else 0
        self._running: dict[Any, Task] = {}
        self._references: dict[Path, Any] = {}

    def start(self, task: Task) -> bool:
        """Hand a task to Ray, which keeps it until a machine has room."""
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
        # A machine that is smaller than the prediction says so itself; waiting for a larger one could last forever.
        wanted = min(int(task.peaks["ram"] * (1 + MARGIN)) if task.peaks else self._largest, self._largest)
        remote = self._ray.remote(run_cell).options(
            num_cpus=1, num_gpus=self._gpus, memory=wanted, max_retries=MOST_TRIES - 1, name=task.cell.name
        )
        self._running[remote.remote(sent, self._reference(task))] = task
        return True

    def _reference(self, task: Task) -> Any:
        """The reference's predictions in the object store, owned by this process: no machine's death loses them."""
        import numpy as np

        path = task.work / "reference.bin"
        if task.cell.is_reference or not path.exists():
            return None
        if path not in self._references:
            self._references[path] = self._ray.put(np.fromfile(path, np.uint8))
        return self._references[path]

    def reports(self, seconds: float) -> list[Report]:
        """Rows of cells that have ended, waiting at most `seconds` for one."""
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
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            row = asdict(Row(task.cell.variant.name, error=f"Its worker died {MOST_TRIES} times: {reason}"))
            reference = None
        if reference is not None:
            unfinished = task.work / "reference.part"
            reference.tofile(unfinished)
            unfinished.replace(task.work / "reference.bin")
        return Report(task, row=Row(**row))

    def note(self) -> str:
        return "Cells ran on a cluster, each with one core or one GPU: compare speeds only between equal machines."

    def close(self) -> None:
        """End what still runs, and leave the cluster."""
        for handle in self._running:
            self._ray.cancel(handle, force=True)
        self._ray.shutdown()


def _cause(error: Any) -> Exception:
    """What a task failed with before it could make a row: another version, a folder that is not there, no lowmem."""
    cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
    if isinstance(cause, ModuleNotFoundError):
        return Unsupported(f"The cluster's machines lack a package: {cause}", "Install lowmem on each of them.")
    return cause
