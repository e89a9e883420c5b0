"""Bytes of layers that a checkpoint stores quantized, as they are held while the model runs.

On a CPU (computing in fp32) ONNX Runtime's MatMulNBits holds them, see `quant.nbits_linear`, or int8 does, see
`quant.int8_fine`; elsewhere `quant.packed_linear`. What a checkpoint leaves dense runs in int8 on CPUs.
"""

from __future__ import annotations

import math
import platform

from lowmem.models.quantization import BNB, Quantization
from lowmem.models.spec import DTYPE_BYTES, ModelSpec

NBITS = 4
"""Width of MatMulNBits' codes."""

LARGEST_BLOCK, SMALLEST_BLOCK = 64, 16
"""Inputs that share a scale inside MatMulNBits. With 128 its kernel is half as fast as with 64 (onnxruntime 1.32)."""

SESSION_BYTES = 40_000
"""What an inference session of one node holds beside its weights (onnxruntime 1.32, measured over 200)."""

KERNELS_BYTES = 34_000_000
"""ONNX Runtime's code and its first session (1.32, measured)."""


def rest_precision(dtype: str, stored: Quantization | None = None) -> str:
    """What layers that are not packed are held in: int8 on CPUs that have it, else the compute dtype.

    A tied head is a fifth of a small model, and in fp32 costs more of a decoding step than all packed layers.
    bitsandbytes' layers take far longer on CPUs, and keep everything else as it is.
    """
    if stored is not None and stored.method == BNB:
        return dtype
    return "int8" if dtype == "fp32" and platform.machine().lower() in ("x86_64", "amd64") else dtype


def block_size(group_size: int) -> int:
    """The largest block of MatMulNBits that divides a group, 0 when there is none."""
    if group_size < 0:
        return LARGEST_BLOCK
    power = group_size & -group_size
    return min(power, LARGEST_BLOCK) if power >= SMALLEST_BLOCK else 0


def cpu_kernel(stored: Quantization) -> str:
    """What runs such layers on a CPU: "nbits", "int8", "bnb", or "plain" where there is none of them.

    MatMulNBits computes in fp32 and fast with 4 bits only. 2 and 3 bits live in 4-bit codes, as exact; 8 bits and odd groups are
    rounded to int8 a second time, which is faster and takes less memory than any other way to run them.
    """
    if stored.method == BNB:
        return "bnb"
    if stored.bits <= NBITS and block_size(stored.group_size):
        return "nbits"
    return "int8" if rest_precision("fp32") == "int8" else "plain"


def stored_width(bits: int) -> int:
    """Bits a code takes in `packed_linear`: 3 do not fill bytes, and live in 4."""
    return 4 if bits == 3 else bits


def packed_bytes(stored: Quantization, outputs: int, inputs: int, dtype: str) -> int:
    """Bytes of one layer, its bias not counted, where activations are computed in `dtype`."""
    order = 8 * inputs if stored.desc_act else 0
    kernel = cpu_kernel(stored) if dtype == "fp32" else ""
    if kernel == "nbits":
        return _nbits_bytes(stored, outputs, inputs) + order
    if kernel == "int8":
        return int8_bytes(outputs, inputs)
    # Codes; a zero point of one byte and a scale of two for every group.
    codes = math.ceil(inputs * stored_width(stored.bits) / 8) * outputs
    return codes + 3 * stored.groups(inputs) * outputs + order


def _nbits_bytes(stored: Quantization, outputs: int, inputs: int) -> int:
    """Codes, fp32 scales and zero points of every block, and the session itself."""
    block = block_size(stored.group_size)
    blocks = math.ceil(inputs / block)
    codes = outputs * blocks * block * NBITS // 8
    return codes + 4 * outputs * blocks + outputs * math.ceil(blocks * NBITS / 8) + SESSION_BYTES


def int8_bytes(rows: int, columns: int) -> int:
    """FBGEMM packs columns in blocks of 512 and keeps per row a scale, a zero point and an offset."""
    return rows * (math.ceil(columns / 512) * 512 + 12)


def dense_bytes(spec: ModelSpec, dtype: str) -> int:
    """The largest packed layer multiplied out, and a lane of its codes: what a GPU holds while that layer computes."""
    if spec.stored is None or spec.stored.method == BNB or (dtype == "fp32" and cpu_kernel(spec.stored) != "plain"):
        return 0
    largest = max((rows * columns for rows, columns in spec.packed_layers.values()), default=0)
    return largest * (DTYPE_BYTES[dtype] + 1)


def repacking_bytes(outputs: int, inputs: int) -> int:
    """What the loader holds beside one finished layer: its words, its codes in bytes, and copies of their blocks."""
    return 4 * outputs * inputs
