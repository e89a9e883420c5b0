"""The model card of a quantized checkpoint: README.md with front matter, as the hub shows it. Imports no torch.

What vLLM serves follows its loaders (`vllm/model_executor/layers/quantization/auto_gptq.py` and `auto_awq.py`, and
`utils/marlin_utils.py`, as of 2026): GPTQ in format v1 with 4 or 8 bits and without zero points, AWQ with 4 bits, both
in groups of 32, 64, 128 or a whole row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.units import format_bytes, format_seconds
from lowmem.version import __version__

CARD = "README.md"
VLLM_GROUPS = (-1, 32, 64, 128)


def vllm(group_size: int, refused: str = "", instead: str = "") -> str:
    """The paragraph on vLLM: the command that serves the folder, or the reason why its kernels cannot and an alternative."""
    if group_size not in VLLM_GROUPS:
        refused, instead = f"groups of {group_size}", "in groups of 32, 64 or 128"
    if refused:
        return f"vLLM's kernels do not take {refused}; quantize {instead} to serve the model with it."
    return "Serve it with vLLM, with this folder or its repository in place of FOLDER:\n\n    vllm serve FOLDER"


def write_card(
    folder: Path, receipt: Receipt, options: Mapping[str, Any], *, format: str, licence: str, calibration: str,
    serving: str,
) -> None:  # fmt: skip
    """Write README.md with the figures of the quantization.

    Args:
        options: of the method, by name.
        format: the storage format, for the card's tags.
        licence: of the original; "" if unknown.
        calibration: the text the method was calibrated on; "" without calibration.
        serving: a paragraph on how to serve the folder, or "".
    """
    details, bits = receipt.details, receipt.details["bits"]
    licence_line = f"license: {licence}\n" if licence else ""
    rows = {
        "Method": receipt.precision,
        "Calibration": calibration or "none",
        "Size": f"{format_bytes(details['original_bytes'])} → {format_bytes(receipt.disk_bytes)}",
        "Bits per quantized weight": f"{details['bits_per_quantized_weight']:.2f}",
        "Mean relative loss per layer": f"{details['loss']:.2e}",
        "Time": f"{format_seconds(receipt.seconds)} on {receipt.device}",
        "Peak memory": ", ".join(f"{format_bytes(peak)} {memory.upper()}" for memory, peak in receipt.measured.items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    used = ", ".join(f"{name} {value}" for name, value in options.items())
    text = f"""---
{licence_line}library_name: transformers
pipeline_tag: text-generation
tags: [lowmem, quantized, {format}, {bits}-bit]
---

# {receipt.model}, {bits} bits

Quantized from {receipt.model} by lowmem {__version__}, block by block.

| | |
|---|---|
{table}

The relative loss of a layer is the squared error of its outputs on the calibration text, divided by their squared
norm; without calibration it is that of its weights. Options: {used}.
"""
    (folder / CARD).write_text(f"{text}\n{serving}\n" if serving else text, encoding="utf-8")
