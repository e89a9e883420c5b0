"""Estimates the peak memory and the time of making and measuring a variant. Pure arithmetic, imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from lowmem.errors import LowMemError
from lowmem.kernels.layouts import rows_bytes, rows_group
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.machine.rates import Unmeasured, correction
from lowmem.measure.options import MeasureOptions, predicted_bytes
from lowmem.measure.variants import Variant
from lowmem.measure.windows import cut, tokens_read
from lowmem.models.quantization import BNB, INT8, Quantization, parse_quantization
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.planning.seconds import reading_seconds, seconds_by_size, writing_seconds
from lowmem.quant.estimate import estimate_quantization
from lowmem.quant.layers import Matrices, packed_tables, quantized_matrices
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.seconds import quantize_seconds

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


def seconds(
    spec: ModelSpec, variant: Variant, options: MeasureOptions, hardware: Hardware, budget: MemoryBudget
) -> float:
    """The estimated time of making and measuring `variant`.

    Raises:
        Unmeasured: this machine has not done such work yet.
        LowMemError: it cannot be planned.
    """
    goal = Goal(context=options.prompt_tokens + options.new_tokens, precision=variant.precision or "stored")
    if variant.precision:
        return _measuring_seconds(plan(spec, hardware, budget, goal), options)
    request = variant.request(spec.ref)
    made = plan(quantized(spec, request), hardware, budget, goal)
    return quantize_seconds(spec, request) + _measuring_seconds(made, options)


def total_seconds(
    cells: Iterable[tuple[ModelSpec, Variant]],
    options: MeasureOptions,
    hardware: Hardware,
    budget: MemoryBudget,
    action: str,
) -> float | None:
    """The estimated time of all `cells`, corrected by earlier runs of `action`; None where one cannot be estimated.

    Cells that run side by side take as long together as one after the other: they share the cores.
    """
    try:
        found = sum(seconds(spec, variant, options, hardware, budget) for spec, variant in cells)
    except (LowMemError, Unmeasured):
        return None
    return found * correction(action)


def _measuring_seconds(plan: Plan, options: MeasureOptions) -> float:
    window, stride = options.window_and_stride(plan.spec.context)
    read = tokens_read(cut(options.tokens, window, stride))
    answer = reading_seconds(plan, options.prompt_tokens, options.prompt_tokens)
    answer += writing_seconds(plan, options.new_tokens)
    return seconds_by_size(plan, "loading") + reading_seconds(plan, read, window, "scoring") + options.runs * answer


def quantized(spec: ModelSpec, request: QuantizeRequest) -> ModelSpec:
    """The spec of the checkpoint that quantizing `spec` yields."""
    stored = parse_quantization(request.method.config(request.options))
    matrices = {one.tensor.name: one for one in quantized_matrices(spec, request.options)}
    bits = request.embedding_bits
    tables = {
        table.name: replace(
            table,
            dtype="fp32",
            nbytes=rows_bytes(table.shape[0], table.shape[1], bits),
            packing=(bits, rows_group(table.shape[1], bits)),
        )
        for table in packed_tables(spec, bits)
    }
    tensors = tuple(
        found
        for tensor in (tables.get(tensor.name, tensor) for tensor in spec.tensors)
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
