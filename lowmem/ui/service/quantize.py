"""Quantizing a model for the page: checks a request, estimates it, runs it in a child process. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.datasets import texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.baseline import runtime_bytes
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.messages import msg
from lowmem.models.inventory import unused
from lowmem.quant import DEFAULT, usable
from lowmem.quant.estimate import Estimate, estimate_quantization
from lowmem.quant.layers import check_model
from lowmem.quant.request import EMBEDDING_BITS, QuantizeRequest, output_folder
from lowmem.quant.run import known_seconds, measured, quantize_isolated
from lowmem.ui.service.engine import Engine


class QuantizeService:
    """Quantization for one page's engine."""

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
        restart: bool = False,
        embedding_bits: int = EMBEDDING_BITS[0],
    ) -> QuantizeRequest:
        """The validated request of a visitor, within the memory that is left.

        Args:
            options: fields of the method's `Options`; calibration: fields of `Calibration`.
            budget: for this process and the one that quantizes.
            restart: delete an unfinished run with other settings.
            embedding_bits: of embedding and output head.

        Raises:
            BadInput, Unsupported: see `QuantizeRequest.validated`; a file that this visitor may not name.
        """
        request = QuantizeRequest.validated(
            model,
            method,
            options,
            calibration,
            embedding_bits,
            hardware=self.engine.hardware(),
            budget=self.engine.child_budget(budget),
            allow_paths=not self.engine.public,
            restart=restart,
        )
        text = request.calibration.text
        if text not in texts.NAMES and self.engine.public and not _is_upload(Path(text)):
            raise BadInput(
                msg("There is no calibration text {text!r}.", text=text[:40]),
                msg("Choose one of {names}.", names=", ".join(texts.NAMES)),
            )
        return request

    def estimate(self, request: QuantizeRequest) -> Estimate:
        """What the result and the work will take.

        Raises:
            Unsupported, BadInput: the model cannot be quantized so.
        """
        spec = self.engine.spec(request.model)
        check_model(spec, request)
        # The work runs in a new process, which holds less than this one.
        return estimate_quantization(spec, request, runtime_bytes(), known_seconds(spec, request))

    def measure(self, request: QuantizeRequest) -> None:
        """Measure in a child process what the estimated time lacks; takes some seconds."""
        self.engine.measure(measured(request))

    def output(self, request: QuantizeRequest) -> Path:
        """A new folder for the result, among the visitor's own."""
        return unused(self.engine.access.results / output_folder(self.engine.spec(request.model).name, request).name)

    def quantize(self, request: QuantizeRequest, cancel: CancelToken) -> Iterator[Step | Receipt]:
        """Quantize into `output(request)`; the receipt's `details["folder"]` says where that is."""
        request = replace(request, out=self.output(request))
        for event in self.engine.noted(quantize_isolated(request, cancel)):
            if isinstance(event, Receipt):
                event.details["folder"] = str(request.out)
            yield event

    def overlap(self, calibration: str) -> str:
        """A warning when a visitor's own calibration text contains part of the evaluation text, else ""."""
        from lowmem.quant.calibration import overlap_warning

        return overlap_warning(texts.calibration_text(Path(calibration)).text, texts.evaluation_text().text)

    def inspect_weights(
        self, model: str, bits: int, group: int, cancel: CancelToken
    ) -> Iterator[Step | dict[str, Any]]:
        """Round some layers of a model to nearest and measure the error, see `plots.weights.job`."""
        self.engine.spec(model)  # refuses models that this visitor may not name
        arguments = {"ref": model, "bits": bits, "group": group, "allow_paths": not self.engine.public}
        return self.engine.isolated("draw_weights", arguments, cancel)


def _is_upload(path: Path) -> bool:
    """Is this a file that a visitor uploaded through gradio?"""
    from gradio.utils import get_upload_folder

    return path.resolve().is_relative_to(Path(get_upload_folder()).resolve())
