"""Measuring variants of models side by side for the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import MemoryBudget
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import parse_variants
from lowmem.messages import msg
from lowmem.quant import all_methods
from lowmem.sweep.grid import MAX_CELLS, Grid
from lowmem.sweep.table import default_folder
from lowmem.ui.service.engine import Engine

MOST_VARIANTS = 12
LARGEST_TEXT_TOKENS = 65_536


class CompareService:
    """Comparisons and sweeps for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def variants(self) -> list[str]:
        """What can be compared here: precisions that run, then quantizations."""
        precisions = [key for key, why in self.engine.precisions().items() if why is None and key != "stored"]
        hardware = self.engine.hardware()
        usable = (method for method in all_methods() if method.available(hardware) is None)
        return precisions + [preset for method in usable for preset in method.presets]

    def reference(self) -> str:
        """The precision that variants are measured against: the original's own where it runs."""
        return "fp32" if "fp32" in self.variants() else "fp16"

    def compare(
        self, model: str, variants: Sequence[str], text: str, options: MeasureOptions, budget: MemoryBudget,
        cancel: CancelToken,
    ) -> Iterator[Step | Row | Receipt]:  # fmt: skip
        """Measure variants of a model, each in its own child process."""
        from lowmem.measure.compare import compare

        chosen = parse_variants(variants)
        if len(chosen) > MOST_VARIANTS:
            raise BadInput(
                msg(
                    "{chosen} variants are more than the {most_variants} allowed.",
                    chosen=len(chosen),
                    most_variants=MOST_VARIANTS,
                ),
                msg("Select fewer."),
            )
        self._check(text, options)
        self.engine.spec(model)  # refuses models that this visitor may not name
        first = "fp32" if "fp32" in self.variants() else chosen[0].name
        budget = self.engine.child_budget(budget)
        events = compare(model, chosen, text, reference=first, options=options, budget=budget, cancel=cancel)
        return self.engine.noted(events)

    def sweep(
        self, grid: Grid, budget: MemoryBudget, cancel: CancelToken, workers: int = 0
    ) -> Iterator[Step | Row | Receipt]:
        """Measure a grid of models and variants, as many in parallel as the budget holds; its table is stored."""
        from lowmem.sweep.run import sweep

        cells = len(grid.cells())
        if self.engine.public and cells > MOST_VARIANTS:
            raise BadInput(
                msg(
                    "{cells} cells are more than the {most_variants} a visitor may run.",
                    cells=cells,
                    most_variants=MOST_VARIANTS,
                ),
                msg("Choose fewer."),
            )
        if cells > MAX_CELLS:
            raise BadInput(
                msg("{cells:,} cells are more than the {max_cells} allowed.", cells=cells, max_cells=MAX_CELLS),
                msg("Choose fewer."),
            )
        self._check(grid.text, grid.options)
        for model in grid.models:
            self.engine.spec(model)  # refuses models that this visitor may not name
        budget = self.engine.child_budget(budget)
        return self.engine.noted(sweep(grid, self._table_folder(grid), workers=workers, budget=budget, cancel=cancel))

    def _table_folder(self, grid: Grid) -> Path | None:
        """Among the visitor's own results; None for the owner's usual one."""
        if self.engine.access.owned:
            return None
        return self.engine.access.results / default_folder(grid, texts.evaluation_text(grid.text)).name

    def _check(self, text: str, options: MeasureOptions) -> None:
        if self.engine.public and options.tokens > LARGEST_TEXT_TOKENS:
            raise BadInput(
                msg(
                    "{tokens:,} tokens are more than the {largest_text_tokens:,} allowed.",
                    tokens=options.tokens,
                    largest_text_tokens=LARGEST_TEXT_TOKENS,
                ),
                msg("Use fewer tokens."),
            )
        if text not in texts.NAMES:
            raise BadInput(
                msg("There is no text {text!r}.", text=text[:40]),
                msg("Choose one of {names}.", names=", ".join(texts.NAMES)),
            )
