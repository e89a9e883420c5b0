"""Exporting a model for the page, and timing the graph against PyTorch. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowmem.events import CancelToken, Receipt, Step
from lowmem.export.request import ExportEstimate, ExportRequest, estimate
from lowmem.export.run import benchmark, export_isolated, measured, output_folder
from lowmem.machine.baseline import runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.planning.graph_options import ExportOptions
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.results import result_folder


class ExportService:
    """Export for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def estimate(self, model: str, options: ExportOptions, budget: MemoryBudget) -> ExportEstimate:
        """Size, memory and time of an export; writes nothing."""
        spec = self.engine.spec(model, encoders=True)
        return estimate(spec, options, runtime_bytes(), self.engine.child_budget(budget).limit("ram"))

    def measure(self, model: str, options: ExportOptions) -> None:
        """Measure in a child process what the estimated time lacks; takes some seconds."""
        out = output_folder(self.engine.spec(model, encoders=True).name, options)
        self.engine.measure(measured(ExportRequest(model, out, options)))

    def export(
        self, model: str, options: ExportOptions, budget: MemoryBudget, cancel: CancelToken
    ) -> Iterator[Step | Receipt]:
        """Write the graph and verify it; the receipt's `details["folder"]` says where."""
        out = output_folder(self.engine.spec(model, encoders=True).name, options, self.engine.access.results)
        request = ExportRequest(model, out, options, self.engine.child_budget(budget), not self.engine.public)
        return self.engine.noted(export_isolated(request, cancel))

    def benchmark(
        self, folder: str, model: str, budget: MemoryBudget, cancel: CancelToken
    ) -> Iterator[Step | dict[str, Any]]:
        """Time the graph in `folder`, a result of this page, against PyTorch running `model`.

        Raises:
            BadInput: the folder is no result of this page.
        """
        self.engine.spec(model)  # refuses models that this visitor may not name
        return benchmark(model, result_folder(self.engine.access, folder), cancel, self.engine.child_budget(budget))
