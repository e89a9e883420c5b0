"""Estimates the peak memory of a cell, so that cells can run in parallel. Pure arithmetic, imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
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
from lowmem.quant.layers import Matrices, quantized_matrices
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
    matrices = {one.tensor.name: one for one in quantized_matrices(spec, request.options)}
    tensors = tuple(
        found
        for tensor in spec.tensors
        for found in (_stored(matrices[tensor.name], stored, request) if tensor.name in matrices else (tensor,))
    )
    return replace(spec, tensors=tensors, quantization=stored.method, stored=stored)


def _stored(matrices: Matrices, stored: Quantization, request: QuantizeRequest) -> Iterator[Tensor]:
    """The packed weights of a linear layer, or of all experts."""
    rows, columns, tensor = matrices.rows, matrices.columns, matrices.tensor
    own = stored.method in (BNB, INT8)
    layer = tensor.name.removesuffix(".weight")
    for number in range(matrices.count):
        expert = f".{number}" if tensor.role == "experts" else ""
        yield replace(
            tensor,
            name=f"{layer}{expert}.{'weight' if own else 'qweight'}",
            dtype=("uint8" if stored.bits == 4 else "int8") if own else "int32",
            shape=stored.qweight_shape(rows, columns),
            nbytes=request.method.layer_bytes(rows, columns, request.options),
        )
