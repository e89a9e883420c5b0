"""Tensors by name, dtype, shape and size, without their values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowmem.units import MB

DTYPE_BYTES = {
    "fp64": 8,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "fp8": 1,
    "fp8_e5m2": 1,
    "fp8_e8m0": 1,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
}
"""Bytes per element of unpacked dtypes. For GGUF tensors, whose dtype is a type name such as "q4_1", see `nbytes`."""

MAX_DIMENSIONS = 8
"""Of a tensor in a file; none of a model has more than 5."""

CONVERSION_BYTES = 64 * MB
"""Most stored bytes that a checkpoint converts to another dtype or layout at a time: what that takes besides the result."""


def conversion_bytes(stored: int) -> int:
    """Bytes of each of the equal chunks in which a tensor of `stored` bytes is converted."""
    return math.ceil(stored / max(1, math.ceil(stored / CONVERSION_BYTES)))


PACKED_PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_scale",
    ".SCB", ".weight_format", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax",
    ".weight.nested_quant_map", ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip
"""Suffixes of the tensors that GPTQ and AWQ, compressed-tensors, and bitsandbytes store in place of a weight, or beside
a weight of codes."""

CODE_DTYPES = ("int8", "uint8")


ROLES = ("linear", "experts", "head", "embedding", "other")
"""A linear layer of a block; a projection of all experts of a layer, stacked; a linear layer outside the blocks; a table
of rows that ids choose from; anything else."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a checkpoint, or, in the inventory of a model, one that the model holds.

    Args:
        name: in the file, or of the model's parameter.
        dtype: in which it is stored.
        nbytes: its exact size in the file, for packed GGUF types too.
        role: what computes with it, one of `ROLES`; "" in a file.
        transposed: a matrix that is stored [inputs, outputs].
        wide: held in fp32 whatever the computation's dtype is.
        parts: tensors of the file that one of its matrices is made of: 2 where gate and up of an expert are stored apart.
        packing: (bits, group size) of a packed weight, where they are not those of the whole checkpoint; of a packed table
            always.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    role: str = ""
    transposed: bool = False
    wide: bool = False
    parts: int = 1
    packing: tuple[int, int] | None = None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def decoded(self) -> bool:
        """Whether the file stores it in fewer or more bytes than its values take: it is computed when it is read."""
        return self.nbytes != self.elements * DTYPE_BYTES.get(self.dtype, 0)

    @property
    def packed_rows(self) -> bool:
        """Whether it is a table of `models.packed_rows`, which is held in memory as it is stored."""
        return self.packing is not None and self.decoded and self.role in ("embedding", "head")

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(number, outputs, inputs) of the matrices that this is: one, or that of every expert."""
        *count, first, second = self.shape
        return (count[0] if count else 1, *((second, first) if self.transposed else (first, second)))

    @property
    def packed_layer(self) -> str:
        """The layer of which this may be the packed weight, zero points, scales or order, or ""."""
        if self.is_packed_weight:
            return self.name.rpartition(".")[0]
        part = next((part for part in PACKED_PARTS if self.name.endswith(part)), "")
        return self.name.removesuffix(part) if part else ""

    @property
    def is_packed_weight(self) -> bool:
        """Could this be the codes of a layer?"""
        return self.name.endswith(".qweight") or (self.name.endswith(".weight") and self.dtype in CODE_DTYPES)
