"""The peak of one cell before it starts, so that cells can be laid side by side. Pure arithmetic, no torch."""

from __future__ import annotations

from dataclasses import replace

from lowmem.errors import LowMemError
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.measure.options import MeasureOptions, predicted_bytes
from lowmem.measure.variants import Variant
from lowmem.models.quantization import BNB, INT8, Quantization
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import is_linear, linear_shape
from lowmem.planning.planner import plan
from lowmem.quant import get
from lowmem.quant.base import Options
from lowmem.quant.calibration import Calibration
from lowmem.quant.estimate import estimate, layer_bytes

Peaks = dict[str, int]
"""Bytes by memory, "ram" and where a GPU is used "vram"."""


def peaks(
    spec: ModelSpec, variant: Variant, options: MeasureOptions, hardware: Hardware, budget: MemoryBudget
) -> Peaks | None:
    """The predicted peaks of making and measuring `variant`; None when it cannot be planned, as its own run will say."""
    goal = Goal(context=options.prompt_tokens + options.new_tokens, precision=variant.precision or "stored")
    try:
        if variant.precision:
            return predicted_bytes(plan(spec, hardware, budget, goal), options)
        method = get(variant.method)
        chosen = method.Options(**variant.options)
        making = estimate(spec, method, chosen, Calibration(**variant.calibration), hardware.runtime_bytes)
        measuring = predicted_bytes(plan(quantized(spec, chosen), hardware, budget, goal), options)
    except LowMemError:
        return None
    return measuring | {"ram": max(measuring["ram"], making.ram_bytes)}


def quantized(spec: ModelSpec, options: Options) -> ModelSpec:
    """The spec of the checkpoint that quantizing `spec` will make."""
    method_name = options.layout.partition("_")[0]  # "gptq" and "gptq_v2" are two layouts of one method
    layouts = {"awq": "gemm", INT8: "int-quantized", BNB: getattr(options, "type", "") if options.bits == 4 else "int8"}
    stored = Quantization(
        method=method_name,
        bits=options.bits,
        group_size=options.group_size,
        layout=layouts.get(method_name, options.layout),
        desc_act=getattr(options, "order", "") == "activation",
    )
    tensors = tuple(_stored(spec, tensor, stored, options) for tensor in spec.tensors)
    return replace(spec, tensors=tensors, quantization=stored.method, stored=stored)


def _stored(spec: ModelSpec, tensor: Tensor, stored: Quantization, options: Options) -> Tensor:
    if not is_linear(tensor):
        return tensor
    rows, columns = linear_shape(spec, tensor)
    own = stored.method in (BNB, INT8)
    return Tensor(
        name=tensor.name if own else tensor.name.removesuffix(".weight") + ".qweight",
        dtype=("uint8" if options.bits == 4 else "int8") if own else "int32",
        shape=stored.qweight_shape(rows, columns),
        nbytes=layer_bytes(rows, columns, options),
    )
