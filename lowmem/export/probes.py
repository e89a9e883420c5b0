"""Measures how fast this machine exports, by exporting small models. Import this late, since it needs torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lowmem.events import drain, until_receipt
from lowmem.export.pipeline import export_folder
from lowmem.export.request import ExportRequest
from lowmem.machine.rates import save_rate
from lowmem.models.spec import ModelSpec
from lowmem.models.synthetic import write_random_gptq, write_random_model
from lowmem.planning.exported import BLOCKS, EXPORTS, VOCABULARY, export_work
from lowmem.planning.graph_options import ExportOptions
from lowmem.settings import settings

SHAPE: dict[str, Any] = {"hidden": 512, "intermediate": 2048, "heads": 8, "tied": True}
BLOCK = 4 * 512**2 + 3 * 512 * 2048
"""Parameters of a block of this shape."""

FEW_BLOCKS, MANY_BLOCKS = 2, 8
FEW_WORDS, MANY_WORDS = 1024, 25_600
"""Numbers of blocks, and sizes of vocabularies, whose times are compared."""


def measure_export(spec: ModelSpec, options: ExportOptions, generic: bool) -> None:
    """Save the rates from which the time to export `spec` follows."""
    first = _seconds(spec, options, FEW_BLOCKS, FEW_WORDS)  # with everything that is imported and opened once
    few = _seconds(spec, options, FEW_BLOCKS, FEW_WORDS)
    blocks, words = (MANY_BLOCKS - FEW_BLOCKS) * BLOCK, (MANY_WORDS - FEW_WORDS) * SHAPE["hidden"]
    per_block = max(0.0, _seconds(spec, options, MANY_BLOCKS, FEW_WORDS) - few) / blocks
    per_word = max(0.0, _seconds(spec, options, FEW_BLOCKS, MANY_WORDS) - few) / words
    once = first - FEW_BLOCKS * BLOCK * per_block - FEW_WORDS * SHAPE["hidden"] * per_word
    for part, seconds in ((EXPORTS, once), (BLOCKS, per_block), (VOCABULARY, per_word)):
        save_rate(f"{part} {export_work(spec, options, generic)}", 1 / max(seconds, 1e-12))


def _seconds(spec: ModelSpec, options: ExportOptions, layers: int, vocab: int) -> float:
    """Seconds to export a model of random numbers that is stored as `spec` is."""
    home = settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        model = Path(scratch) / "model"
        if spec.stored is not None:
            write_random_gptq(model, layers=layers, vocab=vocab, **SHAPE)
        else:
            write_random_model(model, layers=layers, vocab=vocab, **SHAPE)
        request = ExportRequest(str(model), Path(scratch) / "exported", options)
        return drain(until_receipt(export_folder(model, request))).seconds
