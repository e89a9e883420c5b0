"""One quantization as a job: a model by its reference, options as plain data, in a process of its own.

What the page, comparisons and scripts call; `pipeline` does the work. The result of the child is the receipt, whose
measured memory is the child's true peak. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lowmem.errors import Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.fields import build
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import Hardware, probe
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.quant import get
from lowmem.quant.base import Options, Quantizer
from lowmem.quant.calibration import Calibration
from lowmem.settings import settings


def checked(method: str, options: Mapping[str, Any], hardware: Hardware) -> tuple[Quantizer, Options]:
    """The method and its options, both usable here.

    Raises:
        BadInput: no such method, or options that cannot be.
        Unsupported: the method does not run on this machine.
    """
    chosen = get(method)
    if refusal := chosen.available(hardware):
        raise Unsupported(refusal, "Choose another method.")
    made: Options = build(chosen.Options, options)
    made.check()
    return chosen, made


def output_folder(name: str, method: Quantizer, options: Options) -> Path:
    """Where the page puts a result: below `settings().outputs`, named after what it is."""
    groups = f"-g{options.group_size}" if options.group_size > 0 else ""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return settings().outputs / f"{short}-{method.name}-{options.bits}bit{groups}{'-sym' if options.symmetric else ''}"


def quantize_isolated(
    ref: str,
    out: Path,
    method: str,
    options: Mapping[str, Any],
    calibration: Mapping[str, Any],
    *,
    budget: MemoryBudget = UNLIMITED,
    allow_paths: bool = True,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """Quantize `ref` into the new folder `out` in a process of its own; the receipt comes last.

    Raises:
        LowMemError: see `pipeline.quantize_model` and `models.fetch.fetch`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = {
        "ref": ref,
        "out": str(out),
        "method": method,
        "options": dict(options),
        "calibration": dict(calibration),
        "budget": budget.as_dict(),
        "allow_paths": allow_paths,
    }
    for event in run_isolated("quantize", arguments, cancel, budget):
        if isinstance(event, Finished):
            yield replace(_receipt(event.value), measured=_of(event.peak_bytes, event.value["predicted"]))
        else:
            yield event


def _of(peak: Mapping[str, int], predicted: Mapping[str, int]) -> dict[str, int]:
    return {memory: peak[memory] for memory in predicted if memory in peak}


def _receipt(value: Mapping[str, Any]) -> Receipt:
    """The receipt that `as_dict` took apart."""
    given = {field.name: value[field.name] for field in fields(Receipt)}
    return Receipt(**given | {"notes": tuple(given["notes"])})


def job(
    ref: str,
    out: str,
    method: str,
    options: Mapping[str, Any],
    calibration: Mapping[str, Any],
    budget: Mapping[str, int],
    allow_paths: bool = True,
) -> Generator[Step, None, dict[str, Any]]:
    """The child's part: fetch `ref` where it must be, quantize it, return the receipt as a dict."""
    cancel = CancelToken()  # nobody sets it: the parent kills the process
    limit = MemoryBudget(**budget)
    for event in quantize(ref, Path(out), method, options, calibration, limit, allow_paths, cancel):
        if isinstance(event, Receipt):
            return event.as_dict()
        yield event
    raise RuntimeError("an action ended without a receipt")


def quantize(
    ref: str,
    out: Path,
    method: str,
    options: Mapping[str, Any],
    calibration: Mapping[str, Any],
    budget: MemoryBudget = UNLIMITED,
    allow_paths: bool = True,
    cancel: CancelToken | None = None,
) -> Iterator[Step | Receipt]:
    """Quantize `ref` into the new folder `out` in this process; the receipt comes last."""
    hardware = probe()
    chosen, made = checked(method, options, hardware)
    text = build(Calibration, calibration)
    from lowmem.models.fetch import fetch

    folder = yield from fetch(ref, cancel, allow_paths)
    from lowmem.quant.pipeline import quantize_model

    device = hardware.device.key if hardware.device.kind == "cuda" else "cpu"
    yield from quantize_model(folder, out, chosen, made, text, device=device, budget=budget, cancel=cancel)
