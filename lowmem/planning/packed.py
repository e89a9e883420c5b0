"""Bytes of layers that a checkpoint stores quantized, as they are held while the model runs.

On a CPU (computing in fp32) ONNX Runtime's MatMulNBits holds them, see `quant.nbits_linear`; on a GPU they stay as
they are stored, see `quant.packed_linear`. What a checkpoint leaves dense runs in int8 on CPUs.
"""

from __future__ import annotations

import math
import platform

from lowmem.models.quantization import Quantization
from lowmem.models.spec import DTYPE_BYTES, ModelSpec

LARGEST_BLOCK, SMALLEST_BLOCK = 128, 16
"""Inputs that share a scale inside MatMulNBits; activations are quantized in the same blocks."""

SESSION_BYTES = 40_000
"""What an inference session of one node holds beside its weights (onnxruntime 1.32, measured over 200)."""

SPLIT_WEIGHTS = 8_000_000
"""Layers of more weights than this are worth a session per core."""

KERNELS_BYTES = 34_000_000
"""ONNX Runtime's code and its first session (1.32, measured)."""


def rest_precision(dtype: str) -> str:
    """What layers that are not packed are held in: int8 on CPUs that have it, else the compute dtype.

    A tied head is a fifth of a small model, and in fp32 costs more of a decoding step than all packed layers.
    """
    return "int8" if dtype == "fp32" and platform.machine().lower() in ("x86_64", "amd64") else dtype


def block_size(group_size: int) -> int:
    """The largest block of MatMulNBits that divides a group, 0 when there is none."""
    if group_size < 0:
        return LARGEST_BLOCK
    power = group_size & -group_size
    return min(power, LARGEST_BLOCK) if power >= SMALLEST_BLOCK else 0


def container_bits(bits: int) -> int:
    """2 and 3 bits live in 4-bit codes: MatMulNBits is as exact with them, and fast everywhere only with 4 and 8."""
    return 8 if bits == 8 else 4


def packed_bytes(stored: Quantization, outputs: int, inputs: int, dtype: str, cores: int) -> int:
    """Bytes of one layer, its bias not counted, where activations are computed in `dtype`."""
    if dtype == "fp32" and block_size(stored.group_size):
        return _nbits_bytes(stored, outputs, inputs, cores)
    return _stored_bytes(stored, outputs, inputs)


def parts(outputs: int, inputs: int, cores: int) -> int:
    """Sessions that share a layer's outputs; whole rows of 16 each, as the kernels count them."""
    return max(1, min(cores, outputs // 16)) if outputs * inputs > SPLIT_WEIGHTS else 1


def _nbits_bytes(stored: Quantization, outputs: int, inputs: int, cores: int) -> int:
    """Codes; scales, once as given and once packed; their products with the zero points; zero points."""
    bits, block = container_bits(stored.bits), block_size(stored.group_size)
    blocks = math.ceil(inputs / block)
    codes = outputs * blocks * block * bits // 8
    scales = 2 * 4 * outputs * blocks
    sums = 4 * math.ceil(outputs / 16) * 16 * blocks
    zeros = outputs * math.ceil(blocks * bits / 8)
    order = 8 * inputs if stored.desc_act else 0
    return codes + scales + sums + zeros + order + SESSION_BYTES * parts(outputs, inputs, cores)


def _stored_bytes(stored: Quantization, outputs: int, inputs: int) -> int:
    """qweight, qzeros, fp16 scales, and for act-order the group of every input."""
    groups = stored.groups(inputs)
    order = 8 * inputs if stored.desc_act else 0
    return (inputs + groups) * outputs * stored.bits // 8 + 2 * groups * outputs + order


def dense_bytes(spec: ModelSpec, dtype: str) -> int:
    """The largest packed layer multiplied out, which a GPU holds while that layer computes.

    Counted: its weights in `dtype`, a gathered copy of scales or zero points, and the codes of one position of the words.
    """
    if spec.stored is None or (dtype == "fp32" and block_size(spec.stored.group_size)):
        return 0
    largest = max((rows * columns for rows, columns in spec.packed_layers.values()), default=0)
    return largest * (2 * DTYPE_BYTES[dtype] + 1)


def repacking_bytes(outputs: int, inputs: int) -> int:
    """What the loader holds beside one finished layer: its words, codes in bytes, and their blocks."""
    return 4 * outputs * inputs
