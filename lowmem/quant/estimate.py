"""What quantizing will cost, counted from the tensors' shapes before anything is read. Pure arithmetic, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lowmem.errors import BadInput, Unsupported
from lowmem.models.spec import CONVERSION_BYTES, DTYPE_BYTES, ModelSpec, Tensor
from lowmem.planning.model_bytes import activation_bytes, is_linear, linear_shape
from lowmem.quant.base import BNB, INT8, Options, Quantizer
from lowmem.quant.calibration import Calibration
from lowmem.units import GB, MB, MiB

HEADER_BYTES = 8 + MiB
"""Room for the header of a file, see `models.checkpoint_writer`."""

SHARD_BYTES = 2 * GB
"""Most bytes of one weight file of the result."""

ROWS_BYTES = 64 * MB
"""fp32 bytes of the weights that the GPTQ solver works on at a time; rows are independent of each other."""

LIBRARIES_BYTES = 50 * MB
"""What running a block adds to the process: LAPACK, the family's code, what the tokenizer leaves behind (measured)."""

AT_ONCE = 2
"""Layers that data-free methods work on side by side."""

PACKED = 32
"""Inputs and outputs of a packed layer come in multiples of this, so that words are full for every width."""

_BNB_STATE_BYTES = 180
_SOLVER_COPIES = 7  # target, weight, codes, values, gradient, and two temporaries
_CHUNK_BYTES = 16 * MB  # the rows that data-free methods work on, in all their copies


@dataclass(frozen=True, slots=True)
class Estimate:
    """Predicted bytes of one quantization.

    Args:
        output_bytes: weight files of the result.
        quantized_weights: weights that get codes.
        quantized_bytes: what is stored for them.
        ram_bytes: peak of the process's memory, with `runtime_bytes` of torch and Python themselves.
        disk_bytes: the result and everything kept beside it while it is made.
    """

    output_bytes: int
    quantized_weights: int
    quantized_bytes: int
    ram_bytes: int
    disk_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.quantized_bytes / max(1, self.quantized_weights)


def estimate(
    spec: ModelSpec, method: Quantizer, options: Options, calibration: Calibration, runtime_bytes: int = 0
) -> Estimate:
    """Cost of quantizing `spec` on the CPU."""
    tensors = [t for t in spec.tensors if not (t.is_buffer or (spec.tied and t.is_output_embedding))]
    linears = [(tensor, *linear_shape(spec, tensor)) for tensor in tensors if is_linear(tensor)]
    quantized = sum(layer_bytes(rows, columns, options) for _, rows, columns in linears)
    others = sum(_kept_bytes(tensor) for tensor in tensors if not is_linear(tensor))
    shards = math.ceil((quantized + others) / SHARD_BYTES)
    output = quantized + others + shards * HEADER_BYTES
    outside = [tensor for tensor in tensors if not is_linear(tensor)]
    copying = max((min(t.nbytes, CONVERSION_BYTES) + _kept_bytes(t) for t in outside), default=0)
    block = sum(rows * columns for _, rows, columns in linears) // max(1, spec.layers)
    largest = max((rows * columns for _, rows, columns in linears), default=0)
    packing = 6 * largest  # codes in 32 bits, and the words
    if method.calibrated:
        widest = max((columns for _, _, columns in linears), default=0)
        working = 5 * block + max(_solving_bytes(method, widest, largest), packing)
        working = max(working, 5 * block + _forward_bytes(spec, calibration)) + CONVERSION_BYTES + LIBRARIES_BYTES
        spilled = _spilled_bytes(spec, calibration)
    else:
        stored = max((tensor.nbytes for tensor, _, _ in linears), default=0)
        at_work = stored + _codes_bytes(options) * largest + _CHUNK_BYTES
        working, spilled = quantized // max(1, spec.layers) + AT_ONCE * at_work, 0
    return Estimate(
        output_bytes=output,
        quantized_weights=sum(rows * columns for _, rows, columns in linears),
        quantized_bytes=quantized,
        ram_bytes=runtime_bytes + max(copying, working),
        disk_bytes=output + spilled,
    )


def layer_bytes(rows: int, columns: int, options: Options) -> int:
    """Stored bytes of one layer of `rows` outputs and `columns` inputs."""
    if options.layout == INT8:
        return rows * (columns + 4)
    if options.layout == BNB:
        return _bnb_bytes(rows, columns, options)
    groups = 1 if options.group_size == -1 else columns // options.group_size
    words = math.ceil(columns * options.bits / 32) * rows + math.ceil(rows * options.bits / 32) * groups
    order = 0 if options.layout == "awq" else 4 * columns
    return 4 * words + 2 * groups * rows + order


def _codes_bytes(options: Any) -> int:
    """Bytes per weight that a layer takes beside its stored form while a data-free method makes its codes."""
    if options.layout == INT8:
        return 1
    if options.layout == BNB:
        return 9 if options.bits == 4 else 3  # bitsandbytes works in fp32, and in fp16
    return 3  # codes one a byte, a copy in packing order, and the words


def _bnb_bytes(rows: int, columns: int, options: Any) -> int:
    """As bitsandbytes 0.50 serializes it; the description of 4-bit codes differs by some bytes from layer to layer."""
    if options.bits == 8:
        return rows * (columns + 4) + 1
    blocks = math.ceil(rows * columns / options.group_size)
    scales = blocks + 4 * (math.ceil(blocks / 256) + 256) if options.double else 4 * blocks
    return math.ceil(rows * columns / 2) + scales + 4 * 16 + _BNB_STATE_BYTES


def _kept_bytes(tensor: Tensor) -> int:
    return tensor.elements * min(2, DTYPE_BYTES.get(tensor.dtype, 2))


def _solving_bytes(method: Quantizer, columns: int, largest: int) -> int:
    """The matrices of the inputs, and the rows that are solved for."""
    return method.matrices * 4 * columns * columns + _SOLVER_COPIES * min(ROWS_BYTES, 4 * largest)


def _forward_bytes(spec: ModelSpec, calibration: Calibration) -> int:
    return activation_bytes(spec, calibration.length, calibration.length, "fp32")


def _spilled_bytes(spec: ModelSpec, calibration: Calibration) -> int:
    """Inputs and outputs of a block, and the inputs of the last layers of attention and MLP."""
    width = 2 * spec.hidden + spec.heads * spec.head_dim + spec.intermediate
    return 4 * calibration.tokens * width


def check_shapes(spec: ModelSpec, group_size: int) -> None:
    """Can the layers of `spec` be packed in such groups?

    Raises:
        BadInput, Unsupported: naming the layer that cannot.
    """
    for tensor in filter(is_linear, spec.tensors):
        rows, columns = linear_shape(spec, tensor)
        if group_size != -1 and columns % group_size:
            fitting = ", ".join(str(size) for size in (32, 64, 128, 256) if columns % size == 0)
            raise BadInput(
                f"Groups of {group_size} do not divide the {columns:,} inputs of {tensor.name}.",
                f"{fitting} or -1 do." if fitting else "Use -1, one group a row.",
            )
        if rows % PACKED or columns % PACKED:
            raise Unsupported(
                f"{tensor.name} has {columns:,} inputs and {rows:,} outputs; packed layers need multiples of {PACKED}.",
                "Choose another model.",
            )
