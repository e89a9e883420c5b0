"""Quantizing a folder in this process, for tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.quant.calibration import Calibration
from lowmem.quant.pipeline import quantize_folder
from lowmem.quant.request import QuantizeRequest, changed


def quantize_events(
    folder: Path,
    out: Path,
    method: str,
    options: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    *,
    embedding_bits: int = 16,
    budget: MemoryBudget = UNLIMITED,
    cancel: CancelToken | None = None,
    restart: bool = False,
) -> Iterator[Step | Receipt]:
    text = changed(calibration or Calibration())
    request = QuantizeRequest.validated(
        str(folder), method, options, text, embedding_bits, out=out, budget=budget, restart=restart
    )
    return quantize_folder(folder, request, cancel)
