"""The estimated time of quantizing: work counted from the tensors' shapes, at rates that were measured with that work.

Without calibration every weight takes equally long, as long as in a small model. With it, every block runs the calibration text once, and then the
layers of each stage (those that share an input) are solved. The solver works column by column, so a strip of a few columns
but with all rows of the layers gives the time of all columns; what grows with the square of the columns, matrix products
with the Hessian, and with their cube, its factors, is counted in addition. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowmem.machine import rates
from lowmem.machine.rates import Again, saved_rate
from lowmem.models.spec import ModelSpec
from lowmem.quant.base import RATIOS, SAMPLED_ROWS
from lowmem.quant.layers import quantized_matrices
from lowmem.quant.request import QuantizeRequest

STRIP = 512
"""Columns of a measured stage, or as many whole groups."""

STRIP_ROWS = 2048
"""Most rows of a measured layer; from there on time is proportional to them."""

FACTOR_COLUMNS = 2048
"""Most columns of a measured factorization."""

Stage = tuple[int, tuple[int, ...]]
"""Columns, and the rows of each layer."""


def quantize_seconds(spec: ModelSpec, request: QuantizeRequest, device: str = "cpu", again: Again = None) -> float:
    """Seconds that quantizing `spec` takes on `device`.

    Raises:
        Unmeasured: see `rates.Again`.
    """
    method, options = request.method, request.options
    if not method.calibrated:
        work = f"quantizing with {method.name} {options} on {device}"
        seconds = spec.parameters / saved_rate(work, again, lambda: _probes().plain_rate(request))
    else:
        seconds = sum(
            blocks
            * (_calibrating(spec, weights, request, device, again) + _solving_all(stages, request, device, again))
            for blocks, weights, stages in _kinds(spec, request)
        )
    return seconds * rates.correction(action(request))


def action(request: QuantizeRequest) -> str:
    """What is corrected by earlier runs."""
    return f"quantize {request.method.name}"


def _kinds(spec: ModelSpec, request: QuantizeRequest) -> Iterator[tuple[int, float, list[tuple[int, Stage]]]]:
    """Of each kind of block: how many there are, weights that a token passes through, and stages with their number."""
    found = {matrices.tensor.name: matrices for matrices in quantized_matrices(spec, request.options)}
    chosen = spec.experts_per_token / max(1, spec.experts)
    for number, kind in enumerate(spec.blocks.kinds):
        prefix = f"{spec.blocks.path}.{spec.blocks.layers.index(number)}"
        weights, stages = 0.0, []
        for stage in kind.stages:
            names = [name for one in stage.linears for name in (f"{prefix}.{one}", f"{prefix}.{one}.weight")]
            matrices = [found[name] for name in names if name in found]
            if not matrices:
                continue
            first = matrices[0]
            experts = first.tensor.matrices[0]
            rows = tuple(one.rows for one in matrices for _ in range(one.tensor.parts))
            stages.append((experts, (first.columns, rows)))
            weights += first.columns * sum(rows) * (experts * chosen if experts > 1 else 1)
        yield spec.blocks.layers.count(number), weights, stages


def _calibrating(spec: ModelSpec, weights: float, request: QuantizeRequest, device: str, again: Again) -> float:
    """Seconds to run the calibration text through a block and to collect the Hessians of its inputs."""
    length, samples = request.calibration.length, request.calibration.samples
    shape = (spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim)
    work = f"calibrating a block of {' x '.join(map(str, shape))} with {length} tokens on {device}"
    return samples * weights / saved_rate(work, again, lambda: _probes().calibration_rate(*shape, length, device))


def _solving_all(stages: list[tuple[int, Stage]], request: QuantizeRequest, device: str, again: Again) -> float:
    return sum(number * _solving(stage, request, device, again) for number, stage in stages)


def _solving(stage: Stage, request: QuantizeRequest, device: str, again: Again) -> float:
    """Seconds to solve for the layers of a stage."""
    method, options = request.method, request.options
    columns, rows = stage
    width = min(columns, -(-STRIP // options.group_size) * options.group_size if options.group_size > 0 else STRIP)
    share = min(1.0, STRIP_ROWS / max(rows))
    strip = tuple(max(1, round(count * share)) for count in rows)
    work = f"{method.name} {options} of {' + '.join(map(str, strip))} rows on {device}"
    per_second = saved_rate(work, again, lambda: _probes().strip_rate(method, options, strip, width, device))
    seconds = columns / per_second / share
    multiplied = method.products(options) * sum(rows)
    if options.scale_channels:
        multiplied += (1 + RATIOS) * min(SAMPLED_ROWS, sum(rows))
    products = 2 * multiplied * (columns**2 - columns * width)
    factored = min(columns, FACTOR_COLUMNS)
    factors = saved_rate(
        f"factorizing {factored} columns on {device}", again, lambda: _probes().factor_rate(factored, device)
    )
    return seconds + products / _product_rate(device, again) + columns**3 / factors


def _product_rate(device: str, again: Again) -> float:
    """Floating-point operations per second of matrix products in fp32."""
    return saved_rate(f"matrix products on {device}", again, lambda: _probes().product_rate(device))


def _probes() -> Any:
    from lowmem.quant import probes  # imports torch

    return probes
