"""The estimated cost of quantizing, computed from the tensors' shapes before any weight is read. No torch.

Bytes are counted; for seconds see `seconds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.errors import BadInput, Unsupported
from lowmem.messages import msg
from lowmem.models.blocks import FAMILIES
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning.model_bytes import activation_bytes
from lowmem.planning.placement import block_index
from lowmem.quant.calibration import Calibration
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

PARALLEL_LAYERS = 2
"""Layers that methods without calibration work on at the same time."""

PACKED = 32
"""Inputs and outputs of a packed layer come in multiples of this, so that words are full at every bit width."""

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
    """

    original_bytes: int
    output_bytes: int
    quantized_weights: int
    quantized_bytes: int
    ram_bytes: int
    disk_bytes: int
    seconds: float | None = None
    limit: int | None = None

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
    linears = [(tensor, *tensor.matrices[1:]) for tensor in spec.tensors if tensor.role == "linear"]
    quantized = sum(method.layer_bytes(rows, columns, options) for _, rows, columns in linears)
    outside = [tensor for tensor in spec.tensors if tensor.role != "linear"]
    unquantized = sum(map(_unquantized_bytes, outside))
    shards = math.ceil((quantized + unquantized) / SHARD_BYTES)
    output = quantized + unquantized + shards * HEADER_BYTES
    copying = max((_copying_bytes(tensor) for tensor in outside), default=0)
    block = sum(rows * columns for _, rows, columns in linears) // max(1, spec.layers)
    largest = max((rows * columns for _, rows, columns in linears), default=0)
    packing = 6 * largest  # codes in 32 bits, and the words
    if method.calibrated:
        widest = max((columns for _, _, columns in linears), default=0)
        solving = method.matrices * 4 * widest * widest + _SOLVER_COPIES * min(ROWS_BYTES, 4 * largest)
        forward = activation_bytes(spec, calibration.length, calibration.length, 1, "fp32")
        working = 5 * block + max(solving, packing, forward) + CONVERSION_BYTES + LIBRARIES_BYTES
        temporary = _activation_file_bytes(spec, calibration)
    else:
        working, temporary = _rounding_bytes(request, linears), 0
    return Estimate(
        original_bytes=spec.size_on_disk,
        output_bytes=output,
        quantized_weights=sum(rows * columns for _, rows, columns in linears),
        quantized_bytes=quantized,
        ram_bytes=runtime_bytes + max(copying, working),
        disk_bytes=output + temporary,
        seconds=seconds,
        limit=request.budget.ram,
    )


def _rounding_bytes(request: QuantizeRequest, linears: list[tuple[Tensor, int, int]]) -> int:
    """Most bytes of a block without calibration: results of its larger layers, and the next `PARALLEL_LAYERS` at work."""
    method, options = request.method, request.options
    block = [linear for linear in linears if block_index(linear[0].name) == 0]
    at_work, results = [], []
    for tensor, rows, columns in sorted(block, key=lambda linear: -linear[0].elements):
        at_work.append(tensor.nbytes + method.packing_bytes(options) * rows * columns + _ROUNDING_BYTES)
        results.append(method.layer_bytes(rows, columns, options))
    return max(
        (sum(results[:done]) + sum(at_work[done : done + PARALLEL_LAYERS]) for done in range(len(results))), default=0
    )


def _copying_bytes(tensor: Tensor) -> int:
    """A tensor as the result stores it, and the part of the original that is being converted, if it is."""
    converted = DTYPE_BYTES.get(tensor.dtype, 4) > 2
    return _unquantized_bytes(tensor) + (min(tensor.nbytes, CONVERSION_BYTES) if converted else 0)


def _unquantized_bytes(tensor: Tensor) -> int:
    return tensor.elements * min(2, DTYPE_BYTES.get(tensor.dtype, 2))


def _activation_file_bytes(spec: ModelSpec, calibration: Calibration) -> int:
    """Inputs and outputs of a block, and the inputs of the last layers of attention and MLP, in fp32."""
    width = 2 * spec.hidden + spec.heads * spec.head_dim + spec.intermediate
    return 4 * calibration.tokens * width


def check_model(spec: ModelSpec, group_size: int) -> None:
    """Check that `spec` can be quantized block by block in groups of `group_size`.

    Raises:
        Unsupported: it is quantized already, its family is unknown, or its layers cannot be packed.
        BadInput: the groups do not divide a layer; the hint names sizes that do.
    """
    if spec.quantization:
        raise Unsupported(
            msg("{model} is already quantized with {quantization}.", model=spec.name, quantization=spec.quantization),
            msg("Choose the original model."),
        )
    if spec.model_type not in FAMILIES:
        raise Unsupported(
            msg("Models of type {model_type!r} cannot be processed block by block yet.", model_type=spec.model_type),
            msg("These can: {families}.", families=", ".join(FAMILIES)),
        )
    for tensor in spec.tensors:
        if tensor.role != "linear":
            continue
        _, rows, columns = tensor.matrices
        if group_size != -1 and columns % group_size:
            fitting = ", ".join(str(size) for size in (32, 64, 128, 256) if columns % size == 0)
            raise BadInput(
                msg(
                    "Groups of {group_size} do not divide the {columns:,} inputs of {tensor}.",
                    group_size=group_size,
                    columns=columns,
                    tensor=tensor.name,
                ),
                msg("Use {fitting} or -1.", fitting=fitting) if fitting else msg("Use -1, one group per row."),
            )
        if rows % PACKED or columns % PACKED:
            raise Unsupported(
                msg(
                    "{tensor} has {columns:,} inputs and {rows:,} outputs; packed layers need multiples of {packed}.",
                    tensor=tensor.name,
                    columns=columns,
                    rows=rows,
                    packed=PACKED,
                ),
                msg("Choose another model."),
            )
