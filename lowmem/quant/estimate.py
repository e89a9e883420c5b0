"""The estimated cost of quantizing, computed from the tensors' shapes before any weight is read. No torch.

Bytes are counted; for seconds see `seconds`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem.kernels.layouts import ROWS_AT_WORK_BYTES, rows_bytes
from lowmem.messages import msg
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor, conversion_bytes
from lowmem.planning.model_bytes import activation_bytes
from lowmem.planning.placement import block_index
from lowmem.quant.calibration import Calibration
from lowmem.quant.layers import Matrices, packed_tables, quantized_matrices
from lowmem.quant.request import QuantizeRequest
from lowmem.units import GB, MB, MiB, format_bytes

HEADER_BYTES = 8 + MiB
"""Room for the header of a file, see `models.checkpoint_writer`."""

SHARD_BYTES = 2 * GB
"""Most bytes of one weight file of the result."""

ROWS_BYTES = 64 * MB
"""fp32 bytes of the weights that the GPTQ solver works on at a time; rows are independent of each other."""

LIBRARIES_BYTES = 50 * MB
"""What running a block adds to the process: LAPACK, the family's code, leftovers of the tokenizer (measured)."""

PIPELINE_BYTES = 18 * MB
"""What any quantization adds to the process: its modules, the family's code and an empty model (measured)."""

PARALLEL_LAYERS = 2
"""Layers that methods without calibration work on at the same time."""

SHARD_TENSORS = 5000
"""Most tensors of one file: its header has room for no more."""

EXPERTS_BYTES = 512 * MB
"""fp32 bytes of the Hessians of experts that are collected at a time."""

_SOLVER_COPIES = 7  # target, weight, codes, values, gradient, and two temporaries
_ROUNDING_BYTES = 16 * MB  # the rows that methods without calibration work on, in all their copies


@dataclass(frozen=True, slots=True)
class Estimate:
    """The predicted cost of one quantization.

    Args:
        original_bytes: weight files of the original.
        output_bytes: weight files of the result.
        quantized_weights: number of weights that are quantized.
        quantized_bytes: bytes stored for them: codes, scales and zero points.
        ram_bytes: peak memory of the process, including torch and Python themselves.
        disk_bytes: the result and all temporary files.
        seconds: time it will take, see `seconds.quantize_seconds`; None if this machine was not measured.
        limit: bytes that the process may hold; None for no limit.
        parameters: all of the model's.
    """

    original_bytes: int
    output_bytes: int
    quantized_weights: int
    quantized_bytes: int
    ram_bytes: int
    disk_bytes: int
    seconds: float | None = None
    limit: int | None = None
    parameters: int = 0

    @property
    def bits_per_parameter(self) -> float:
        """Of the whole result, embedding and output head included."""
        return 8 * self.output_bytes / max(1, self.parameters)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Codes, scales and zero points, of quantized weights alone: without embeddings, see `Row.bits_per_parameter`."""
        return 8 * self.quantized_bytes / max(1, self.quantized_weights)

    @property
    def verdict(self) -> str:
        """ "fits", "tight" (above 90 % of the limit) or "over"."""
        if self.limit is None or self.ram_bytes <= 0.9 * self.limit:
            return "fits"
        return "tight" if self.ram_bytes <= self.limit else "over"

    def sentence(self) -> str:
        peak, limit = format_bytes(self.ram_bytes), format_bytes(self.limit or 0)
        if self.limit is None:
            return msg("Needs {peak} of RAM.", peak=peak)
        if self.verdict == "over":
            over = format_bytes(self.ram_bytes - self.limit)
            return msg(
                "Needs {peak} of RAM, {over} more than the {limit} available.", peak=peak, over=over, limit=limit
            )
        if self.verdict == "tight":
            return msg("Tight: {peak} of the {limit} of RAM available.", peak=peak, limit=limit)
        return msg("Fits: {peak} of the {limit} of RAM available.", peak=peak, limit=limit)


def estimate_quantization(
    spec: ModelSpec, request: QuantizeRequest, runtime_bytes: int = 0, seconds: float | None = None
) -> Estimate:
    """The cost of quantizing `spec` on the CPU as `request` says.

    Args:
        runtime_bytes: what Python and torch themselves hold, part of `ram_bytes`.
        seconds: the time, see `Estimate`.
    """
    method, options, calibration = request.method, request.options, request.calibration
    matrices = quantized_matrices(spec, options)
    quantized = sum(one.count * method.layer_bytes(one.rows, one.columns, options) for one in matrices)
    tables = packed_tables(spec, request.embedding_bits)
    table_sizes = [rows_bytes(table.shape[0], table.shape[1], request.embedding_bits) for table in tables]
    names = {one.tensor.name for one in matrices} | {table.name for table in tables}
    rest = [tensor for tensor in spec.tensors if tensor.name not in names]
    unquantized = sum(map(_unquantized_bytes, rest)) + sum(table_sizes)
    # Every layer is stored as four tensors at most.
    stored_tensors = len(rest) + 2 * len(tables) + 4 * sum(one.count for one in matrices)
    shards = max(math.ceil((quantized + unquantized) / SHARD_BYTES), math.ceil(stored_tensors / SHARD_TENSORS))
    output = quantized + unquantized + shards * HEADER_BYTES
    copying = max(
        max((_copying_bytes(tensor) for tensor in rest), default=0),
        max((size + 6 * ROWS_AT_WORK_BYTES for size in table_sizes), default=0),
    )
    if method.calibrated:
        working, temporary = _calibrating_bytes(spec, request, matrices), _activation_file_bytes(spec, calibration)
    else:
        working, temporary = _rounding_bytes(request, matrices) + PIPELINE_BYTES, 0
    weights = sum(one.elements for one in matrices)
    return Estimate(
        original_bytes=spec.size_on_disk,
        output_bytes=output,
        quantized_weights=weights,
        quantized_bytes=quantized,
        ram_bytes=runtime_bytes + max(copying + PIPELINE_BYTES, working),
        disk_bytes=output + temporary,
        seconds=seconds,
        limit=request.budget.ram,
        parameters=spec.parameters,
    )


def _by_block(matrices: Sequence[Matrices]) -> list[list[Matrices]]:
    found: dict[int | None, list[Matrices]] = {}
    for one in matrices:
        found.setdefault(block_index(one.tensor.name), []).append(one)
    return list(found.values())


def _calibrating_bytes(spec: ModelSpec, request: QuantizeRequest, matrices: Sequence[Matrices]) -> int:
    """Most bytes of a block with calibration: weights in fp32 and codes, and what solving or a forward pass takes."""
    method, length = request.method, request.calibration.length
    block = max((sum(one.elements for one in block) for block in _by_block(matrices)), default=0)
    largest = max((one.rows * one.columns for one in matrices), default=0)
    packing = 6 * largest  # codes in 32 bits, and the words
    hessians = max((method.matrices * _square(one) + _expert_bytes(one) for one in matrices), default=0)
    solving = hessians + _SOLVER_COPIES * min(ROWS_BYTES, 4 * largest)
    forward = activation_bytes(spec, length, length, 1, "fp32")
    return 5 * block + max(solving, packing, forward) + CONVERSION_BYTES + LIBRARIES_BYTES


def _square(one: Matrices) -> int:
    """Bytes of a Hessian."""
    return 4 * one.columns * one.columns


def _expert_bytes(one: Matrices) -> int:
    """Bytes of the Hessians of the experts at a time, and of the one that all share."""
    return (experts_at_once(one.columns, one.tensor.matrices[0]) + 1) * _square(one) if one.count > 1 else 0


def experts_at_once(columns: int, experts: int) -> int:
    """Experts with `columns` inputs whose Hessians are collected in one pass over the calibration text."""
    return min(experts, max(1, EXPERTS_BYTES // (4 * columns * columns)))


def _rounding_bytes(request: QuantizeRequest, matrices: Sequence[Matrices]) -> int:
    """Most bytes of a block without calibration: results of its larger layers, and the next `PARALLEL_LAYERS` at work."""
    return max((_block_rounding_bytes(request, block) for block in _by_block(matrices)), default=0)


def _block_rounding_bytes(request: QuantizeRequest, block: Sequence[Matrices]) -> int:
    method, options = request.method, request.options
    done, most = 0, 0
    ordered = sorted(block, key=lambda one: -one.rows * one.columns)
    at_work = [
        one.tensor.nbytes // one.count + method.packing_bytes(options) * one.rows * one.columns + _ROUNDING_BYTES
        for one in ordered
        for _ in range(min(one.count, PARALLEL_LAYERS))
    ]
    number = 0
    for one in ordered:
        each = method.layer_bytes(one.rows, one.columns, options)
        alike = min(one.count, PARALLEL_LAYERS)
        # The last of equal matrices are at work beside the results of all others.
        for left in range(alike, 0, -1):
            results = done + (one.count - left) * each
            most = max(most, results + sum(at_work[number : number + PARALLEL_LAYERS]))
            number += 1
        done += one.count * each
    return most


def _copying_bytes(tensor: Tensor) -> int:
    """A tensor as the result stores it, and the part of the original that is being converted, if it is."""
    converted = DTYPE_BYTES.get(tensor.dtype, 4) > 2
    return _unquantized_bytes(tensor) + (conversion_bytes(tensor.nbytes) if converted else 0)


def _unquantized_bytes(tensor: Tensor) -> int:
    size = DTYPE_BYTES.get(tensor.dtype, 2)
    return tensor.elements * (size if tensor.wide else min(2, size))


def _activation_file_bytes(spec: ModelSpec, calibration: Calibration) -> int:
    """Inputs and outputs of a block, and the inputs of the last layers of its branches, in fp32."""
    inputs = {tensor.name: tensor.matrices[2] for tensor in spec.tensors if tensor.role == "linear"}
    widths = [
        sum(
            inputs.get(f"{spec.blocks.path}.{index}.{branch.output}.weight", 0)
            for branch in spec.blocks[index].branches
        )
        for index in range(len(spec.blocks))
    ]
    return 4 * calibration.tokens * (2 * spec.hidden + max(widths, default=0))
