"""Estimates the peak memory of a cell, so that cells can run in parallel. Pure arithmetic, imports no torch."""

from __future__ import annotations

from dataclasses import replace

from lowmem.errors import LowMemError
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.measure.options import MeasureOptions, predicted_bytes
from lowmem.measure.variants import Variant
from lowmem.models.quantization import BNB, INT8, Quantization, parse_quantization
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.quant.estimate import estimate_quantization
from lowmem.quant.request import QuantizeRequest

Peaks = dict[str, int]
"""Bytes by memory: "ram" and, if a GPU is used, "vram"."""


def peaks(
    spec: ModelSpec, variant: Variant, options: MeasureOptions, hardware: Hardware, budget: MemoryBudget
) -> Peaks | None:
    """The estimated peaks of making and measuring `variant`; None if it cannot be planned, which running it will report."""
    goal = Goal(context=options.prompt_tokens + options.new_tokens, precision=variant.precision or "stored")
    try:
        if variant.precision:
            return predicted_bytes(plan(spec, hardware, budget, goal), options)
        request = variant.request(spec.ref)
        making = estimate_quantization(spec, request, hardware.runtime_bytes)
        measuring = predicted_bytes(plan(quantized(spec, request), hardware, budget, goal), options)
    except LowMemError:
        return None
    return measuring | {"ram": max(measuring["ram"], making.ram_bytes)}


def quantized(spec: ModelSpec, request: QuantizeRequest) -> ModelSpec:
    """The spec of the checkpoint that quantizing `spec` yields."""
    stored = parse_quantization(request.method.config(request.options))
    tensors = tuple(_stored(tensor, stored, request) for tensor in spec.tensors)
    return replace(spec, tensors=tensors, quantization=stored.method, stored=stored)


def _stored(tensor: Tensor, stored: Quantization, request: QuantizeRequest) -> Tensor:
    if tensor.role != "linear":
        return tensor
    _, rows, columns = tensor.matrices
    own = stored.method in (BNB, INT8)
    return replace(
        tensor,
        name=tensor.name if own else tensor.name.removesuffix(".weight") + ".qweight",
        dtype=("uint8" if stored.bits == 4 else "int8") if own else "int32",
        shape=stored.qweight_shape(rows, columns),
        nbytes=request.method.layer_bytes(rows, columns, request.options),
    )
