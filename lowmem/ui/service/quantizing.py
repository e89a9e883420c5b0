"""What the page may ask of quantizing and measuring. Everything heavy runs in processes of its own; no torch here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.baseline import runtime_bytes
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import parse_variants
from lowmem.quant import DEFAULT, all_methods, usable
from lowmem.quant.estimate import Estimate, check_model, estimate_quantization, record_speed
from lowmem.quant.request import QuantizeRequest, output_folder
from lowmem.quant.run import quantize_isolated
from lowmem.settings import settings
from lowmem.sweep.grid import MAX_CELLS, Grid
from lowmem.ui.service.engine import Engine

MOST_VARIANTS = 12
LARGEST_TEXT_TOKENS = 65_536


class Workshop:
    """Quantizing and comparing for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def methods(self) -> dict[str, str | None]:
        """Every method with None, or with the reason why it does not run here."""
        return usable(self.engine.hardware())

    def request(
        self,
        model: str,
        method: str = DEFAULT,
        options: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        budget: MemoryBudget = UNLIMITED,
    ) -> QuantizeRequest:
        """The validated request of a visitor, within the memory that is left.

        Args:
            options: fields of the method's `Options`; calibration: fields of `Calibration`.
            budget: for this process and the one that quantizes.

        Raises:
            BadInput, Unsupported: see `QuantizeRequest.validated`; a file that strangers may not name.
        """
        request = QuantizeRequest.validated(
            model,
            method,
            options,
            calibration,
            hardware=self.engine.hardware(),
            budget=self.engine.child_budget(budget),
            allow_paths=not self.engine.public,
        )
        text = request.calibration.text
        if text not in texts.NAMES and self.engine.public and not _is_upload(Path(text)):
            raise BadInput(f"There is no calibration text {text[:40]!r}.", f"Choose one of {', '.join(texts.NAMES)}.")
        return request

    def estimate(self, request: QuantizeRequest) -> Estimate:
        """What the result and the work will take.

        Raises:
            Unsupported, BadInput: the model cannot be quantized so.
        """
        spec = self.engine.spec(request.model)
        check_model(spec, request.options.group_size)
        # The work runs in a new process, which holds less than this one.
        return estimate_quantization(spec, request, runtime_bytes())

    def output(self, request: QuantizeRequest) -> Path:
        """A new folder for the result, below `settings().outputs`."""
        first = output_folder(self.engine.spec(request.model).name, request)
        names = (first if number == 1 else first.with_name(f"{first.name}-{number}") for number in range(1, 1000))
        return next(folder for folder in names if not folder.exists())

    def quantize(self, request: QuantizeRequest, cancel: CancelToken) -> Iterator[Step | Receipt]:
        """Quantize into `output(request)`; the receipt's `details["folder"]` says where that is."""
        request = replace(request, out=self.output(request))
        for event in quantize_isolated(request, cancel):
            if isinstance(event, Receipt):
                event.details["folder"] = str(request.out)
                self.engine.note(event)
                if not event.details["resumed_blocks"]:
                    record_speed(self.engine.spec(request.model), request, event.seconds)
            yield event

    def overlap(self, calibration: str) -> str:
        """A sentence when a visitor's own text contains part of the evaluation text, else ""."""
        from lowmem.quant.calibration import overlap_warning

        return overlap_warning(texts.calibration_text(Path(calibration)).text, texts.evaluation_text().text)

    def variants(self) -> list[str]:
        """What can be put side by side here: precisions that run, then quantizations."""
        precisions = [key for key, why in self.engine.precisions().items() if why is None and key != "stored"]
        hardware = self.engine.hardware()
        usable = (method for method in all_methods() if method.available(hardware) is None)
        return precisions + [preset for method in usable for preset in method.presets]

    def compare(
        self, ref: str, variants: Sequence[str], text: str, options: MeasureOptions, cancel: CancelToken,
        budget: MemoryBudget,
    ) -> Iterator[Step | Row | Receipt]:  # fmt: skip
        """Measure variants of a model, each in a process of its own."""
        from lowmem.measure.compare import compare

        chosen = parse_variants(variants)
        if len(chosen) > MOST_VARIANTS:
            raise BadInput(f"{len(chosen)} variants are more than {MOST_VARIANTS}.", "Tick fewer.")
        self._check_measuring(text, options)
        self.engine.spec(ref)  # refuses paths that strangers may not name
        budget = self.engine.child_budget(budget)
        first = "fp32" if "fp32" in self.variants() else chosen[0].name
        return self._noted(compare(ref, chosen, text, reference=first, options=options, budget=budget, cancel=cancel))

    def sweep(
        self, grid: Grid, cancel: CancelToken, budget: MemoryBudget, workers: int = 0
    ) -> Iterator[Step | Row | Receipt]:
        """Measure a grid of models and variants, as many side by side as the budget holds; its table is kept."""
        from lowmem.sweep.run import sweep

        cells = len(grid.cells())
        if self.engine.public and cells > MOST_VARIANTS:
            raise BadInput(f"{cells} cells are more than the {MOST_VARIANTS} of a visitor.", "Choose fewer.")
        if cells > MAX_CELLS:
            raise BadInput(f"{cells:,} cells are more than {MAX_CELLS}.", "Choose fewer.")
        self._check_measuring(grid.text, grid.options)
        for model in grid.models:
            self.engine.spec(model)  # refuses models that whoever asks may not name
        budget = self.engine.child_budget(budget)
        return self._noted(sweep(grid, workers=workers, budget=budget, cancel=cancel))

    def reference(self) -> str:
        """The precision that others are held against: the original's own where it runs."""
        return "fp32" if "fp32" in self.variants() else "fp16"

    def _check_measuring(self, text: str, options: MeasureOptions) -> None:
        if self.engine.public and options.tokens > LARGEST_TEXT_TOKENS:
            raise BadInput(f"{options.tokens:,} tokens are more than {LARGEST_TEXT_TOKENS:,}.", "Measure on fewer.")
        if text not in texts.NAMES:
            raise BadInput(f"There is no text {text[:40]!r}.", f"Choose one of {', '.join(texts.NAMES)}.")

    def _noted(self, events: Iterator[Step | Row | Receipt]) -> Iterator[Step | Row | Receipt]:
        for event in events:
            if isinstance(event, Receipt):
                self.engine.note(event)
            yield event

    def look(self, ref: str, bits: int, group: int, cancel: CancelToken) -> Iterator[Step | dict[str, Any]]:
        """Round layers of a model to nearest and tell what that did, see `quant.pictures.job`."""
        from lowmem.machine.isolated import Finished, run_isolated

        self.engine.spec(ref)  # refuses models that whoever asks may not name
        arguments = {"ref": ref, "bits": bits, "group": group, "allow_paths": not self.engine.public}
        for event in run_isolated("draw_weights", arguments, cancel):
            yield event.value if isinstance(event, Finished) else event

    def result(self, folder: str) -> Path:
        """A folder that this page made.

        Raises:
            BadInput: it is elsewhere.
        """
        path = Path(folder).resolve()
        if not folder or not path.is_dir() or not path.is_relative_to(settings().outputs.resolve()):
            raise BadInput("Only results of this page can be used.", "Quantize or export a model first.")
        return path

    def push(self, folder: str, repo: str, token: str, private: bool, cancel: CancelToken) -> str:
        """Upload a finished folder; returns its address. For the owner of the page only."""
        from lowmem.models.push import push

        self.engine.access.require_owner("Pushing to the hub")
        path = self.result(folder)
        return push(path, repo, token.strip() or settings().hub_token or "", private=private, cancel=cancel)


def _is_upload(path: Path) -> bool:
    """Is this a file that gradio took from a visitor?"""
    from gradio.utils import get_upload_folder

    return path.resolve().is_relative_to(Path(get_upload_folder()).resolve())
