"""The one line that serves a quantized folder with vLLM, or why vLLM does not take it.

As vLLM's loaders stand (`vllm/model_executor/layers/quantization/auto_gptq.py` and `auto_awq.py`, and
`utils/marlin_utils.py`, read in 2026): GPTQ in layout v1 with 4 or 8 bits and without zero points, AWQ with 4 bits, both in
groups of 32, 64, 128 or a whole row. Other layouts are not spoken of. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.quant.base import BNB, INT8, Options

GROUPS = (-1, 32, 64, 128)
GPTQ_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve a folder: a shell `line`, or the `refusal` with what to quantize instead."""

    line: str = ""
    refusal: str = ""


def vllm(options: Options, folder: str = "FOLDER") -> Serving | None:
    """How vLLM takes what was quantized with `options`; None for layouts that are neither GPTQ's nor AWQ's."""
    if options.layout in (INT8, BNB):
        return None
    if options.group_size not in GROUPS:
        return _no(f"groups of {options.group_size}", "in groups of 32, 64 or 128")
    if options.layout != "awq" and options.bits not in GPTQ_BITS:
        return _no(f"GPTQ layers of {options.bits} bits", "to 4 or 8 bits, symmetric")
    if options.layout == "gptq_v2":
        return _no("GPTQ layers with zero points", "with symmetric on, or with AWQ")
    return Serving(f"vllm serve {folder}")


def _no(what: str, instead: str) -> Serving:
    return Serving(refusal=f"vLLM's kernels do not take {what}; quantize {instead} to serve the model with it.")
