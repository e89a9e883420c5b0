"""How quantized weights lie in memory, and how many bytes that is: the figures that layers and planner share.

Does not import torch, so that planning a run stays cheap.
"""

from __future__ import annotations

import math
import mmap
import platform

from lowmem.machine.monitor import MAPPED_BLOCK
from lowmem.machine.processor import has_vnni
from lowmem.models.quantization import BNB, Quantization
from lowmem.models.spec import DTYPE_BYTES, ModelSpec

TILE_BYTES = 8_000_000
"""Weights that are converted or dequantized at a time on a CPU: about what its caches hold."""

QUANTIZED_ROWS = 4096
"""Rows quantized to int8 at a time, so that the fp32 temporaries stay small beside a large embedding."""

NBITS = 4
"""Bits per code in MatMulNBits; narrower codes are widened."""

NBITS_BLOCK = 64
"""Largest block of a layer that runs in MatMulNBits. With 128 its kernel is half as fast (onnxruntime 1.32)."""

GRAPH_BLOCK = 256
"""Largest block of MatMulNBits in exported graphs: the operator's own limit."""

SMALLEST_BLOCK = 16
"""Smallest block that MatMulNBits accepts."""

NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes' NF4."""

ROWS_GROUP = 32
"""Columns of a packed table that share a scale in 4 and 6 bits."""

ROWS_AT_WORK_BYTES = 2_000_000
"""fp32 bytes of the rows of a packed table that are quantized at a time."""

SESSION_BYTES = 40_000
"""What an inference session of one node holds besides its weights (onnxruntime 1.32, measured over 200)."""

ONNX_RUNTIME_BYTES = 34_000_000
"""ONNX Runtime's code and its first session (1.32, measured)."""


FBGEMM_ROWS, FBGEMM_COLUMNS = 48, 512
"""A tile of FBGEMM's packed int8 weights, with VNNI."""


def has_int8_kernels() -> bool:
    """Whether torch has FBGEMM's int8 kernels for this processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def code_width(bits: int) -> int:
    """Bits that a code takes where codes must fill bytes: 3 become 4."""
    return 4 if bits == 3 else bits


def block_size(group: int, largest: int = NBITS_BLOCK) -> int:
    """The largest block of MatMulNBits that divides a group, 0 if there is none.

    Args:
        group: inputs that share a scale; -1 for a whole row, which is then padded to blocks of `largest`.
    """
    if group < 0:
        return largest
    power = min(group & -group, largest)
    return power if power >= SMALLEST_BLOCK else 0


def cpu_kernel(stored: Quantization) -> str:
    """The kernel that runs such layers on a CPU: "nbits", "int8", "bnb", or "plain" if none of them can.

    MatMulNBits computes in fp32 and is fast with 4 bits only. Codes of 2 and 3 bits are widened to 4, which is exact. Codes of
    8 bits and odd groups are requantized to int8 per row, which is faster and smaller than any alternative.
    """
    if stored.method == BNB:
        return "bnb"
    if stored.bits <= NBITS and block_size(stored.group_size):
        return "nbits"
    return "int8" if has_int8_kernels() else "plain"


def packed_bytes(stored: Quantization, outputs: int, inputs: int, dtype: str) -> int:
    """Bytes of one packed layer without its bias, for activations in `dtype`."""
    order = 8 * inputs if stored.desc_act else 0
    kernel = cpu_kernel(stored) if dtype == "fp32" else ""
    if kernel == "nbits":
        return nbits_bytes(outputs, inputs, NBITS, block_size(stored.group_size)) + SESSION_BYTES + order
    if kernel == "int8":
        return int8_bytes(outputs, inputs)
    # Codes; a zero point of one byte and a scale of two for every group.
    codes = math.ceil(inputs * code_width(stored.bits) / 8) * outputs
    return codes + 3 * stored.groups(inputs) * outputs + order


def nbits_bytes(outputs: int, inputs: int, bits: int, block: int) -> int:
    """MatMulNBits' codes, fp32 scales and zero points."""
    blocks = math.ceil(inputs / block)
    return outputs * (blocks * block * bits // 8 + 4 * blocks + math.ceil(blocks * bits / 8))


def int8_bytes(rows: int, columns: int) -> int:
    """FBGEMM packs tiles of 512 columns, and per row keeps a scale, a zero point and an offset.

    The last tile may be mostly empty (a third of the demo model's int8 weights). Its pages are mapped, but those that hold
    no column are never written, so they take no memory. With VNNI a tile has 48 rows, so that it begins with a page, after
    the 64 bytes that malloc takes before the first; other tiles are too small to have empty pages.
    """
    full, rest = divmod(columns, FBGEMM_COLUMNS)
    last = FBGEMM_COLUMNS if rest else 0
    if rest and has_vnni() and rows * (full + 1) * FBGEMM_COLUMNS >= MAPPED_BLOCK:
        filled = math.ceil((rest * FBGEMM_ROWS + 64) / mmap.PAGESIZE) * mmap.PAGESIZE
        last = min(last, math.ceil(filled / FBGEMM_ROWS))
    return rows * (full * FBGEMM_COLUMNS + last + 12)


def rows_group(columns: int, bits: int) -> int:
    """Columns that share a scale in a packed table (`models.packed_rows`): in 8 bits the row, else 32 where they divide it."""
    return columns if bits == 8 else math.gcd(columns, ROWS_GROUP)


def rows_bytes(rows: int, columns: int, bits: int) -> int:
    """A packed table: codes, and a scale for every group, in fp32 for whole rows and in fp16 for parts."""
    scales = columns // rows_group(columns, bits) * (4 if bits == 8 else 2)
    return rows * (columns * bits // 8 + scales)


def bnb8_bytes(rows: int, columns: int) -> int:
    """LLM.int8: a byte per weight and an fp32 scale per row."""
    return rows * columns + 4 * rows


def nf4_bytes(rows: int, columns: int) -> int:
    """NF4: two weights a byte, and a byte of scale per block, itself scaled per 256 blocks (double quantization)."""
    blocks = math.ceil(rows * columns / NF4_BLOCK)
    return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + 4 * (256 + 16)


def dense_bytes(spec: ModelSpec, dtype: str) -> int:
    """The largest packed layer dequantized, and one lane of its codes: what a GPU holds while that layer computes."""
    if spec.stored is None or spec.stored.method == BNB or (dtype == "fp32" and cpu_kernel(spec.stored) != "plain"):
        return 0
    largest = max((rows * columns for rows, columns in spec.packed_layers.values()), default=0)
    return largest * (DTYPE_BYTES[dtype] + 1)


def repacking_bytes(outputs: int, inputs: int) -> int:
    """What the loader holds beside one finished layer: its words, its codes as bytes, and copies of their blocks."""
    return 4 * outputs * inputs
