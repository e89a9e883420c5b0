"""Packs codes into the words that files store, and back: GPTQ's stream (v1 and v2) and AWQ's GEMM order.

GPTQ packs codes of any width as one little-endian stream, lowest bits first, so that 32 codes fill exactly
`bits` words of 32 bits. AWQ packs eight 4-bit codes a word in an order of its own. The layouts are those of
AutoGPTQ 0.7 and AutoAWQ 0.2; v1 stores zero points minus one, v2 and AWQ as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowmem.kernels.quantized import Quantized, consecutive, largest_code, row_slices

WORD_BITS = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word holds column 8 c + AWQ_ORDER[i]."""

_AWQ_PLACE = tuple(AWQ_ORDER.index(column) for column in range(8))


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [n, count] -> int32 [n, ceil(count * bits / 32)], each row a stream of its own.

    Eight codes, one per byte, are handled as one 64-bit integer whose lowest `bits` bytes are the result.
    """
    count = codes.shape[1]
    if count % WORD_BITS:
        codes = torch.nn.functional.pad(codes, (0, -count % WORD_BITS))
    words = torch.empty(len(codes), codes.shape[1] * bits // WORD_BITS, dtype=torch.int32, device=codes.device)
    for rows in row_slices(*codes.shape):
        eights = codes[rows].reshape(-1).view(torch.int64)
        for lane in _LANES:
            eights = (eights | eights >> (8 - bits) * lane) & _mask(2 * lane, bits)
        stream = eights.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
        words[rows] = stream.view(torch.int32).view(-1, words.shape[1])
    return words[:, : -(-count * bits // WORD_BITS)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 [n, count]: the inverse of `pack`."""
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    codes = torch.empty(len(words), count, dtype=torch.uint8, device=words.device)
    for rows in row_slices(len(words), words.shape[1] * WORD_BITS // bits):
        stream = words[rows].reshape(-1).view(torch.uint8).view(-1, bits)
        eights = torch.nn.functional.pad(stream, (0, 8 - bits)).view(-1).view(torch.int64)
        for lane in reversed(_LANES):
            eights = (eights | eights << (8 - bits) * lane) & _mask(lane, bits)
        codes[rows] = eights.view(torch.uint8).view(len(codes[rows]), -1)[:, :count]
    return codes


_LANES = (1, 2, 4)
"""Codes that are adjacent before each of the three steps that join eight codes."""


def _mask(lane: int, bits: int) -> int:
    """Mask of a signed 64-bit integer in which runs of `lane` codes are adjacent."""
    mask = sum((1 << lane * bits) - 1 << 8 * start for start in range(0, 8, lane))
    return mask - (1 << 64) if mask >> 63 else mask


def to_gptq(weight: Quantized, v2: bool) -> dict[str, Tensor]:
    """`qweight`, `qzeros`, `scales` and `g_idx` of a layer as AutoGPTQ names and lays them out.

    Raises:
        ValueError: v1 with a zero point of 0, which its minus one cannot store.
    """
    zeros = weight.zeros
    if not v2:
        if not bool((zeros > 0).all()):
            raise ValueError("GPTQ v1 cannot store a zero point of 0")
        zeros = zeros - 1
    return {
        "qweight": pack(weight.codes, weight.bits).t().contiguous(),
        "qzeros": pack(zeros.t(), weight.bits),
        "scales": weight.scales.t().contiguous(),
        "g_idx": weight.groups,
    }


def from_gptq(tensors: Mapping[str, Tensor], bits: int, v2: bool) -> Quantized:
    """The inverse of `to_gptq`."""
    scales = tensors["scales"].t().contiguous()
    zeros = gptq_zeros(tensors["qzeros"], bits, len(scales), v2).t().contiguous()
    columns = tensors["g_idx"].shape[0]
    codes = unpack(tensors["qweight"].t(), bits, columns)
    return Quantized(codes, scales, zeros, tensors["g_idx"], bits)


def gptq_zeros(words: Tensor, bits: int, outputs: int, v2: bool) -> Tensor:
    """Zero points uint8 [groups, outputs] from `qzeros`; those of v1 wrap around at the width, as in every kernel."""
    zeros = unpack(words, bits, outputs)
    return zeros if v2 else (zeros + 1) & largest_code(bits)


def to_awq(weight: Quantized) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a layer in AWQ's GEMM layout.

    Raises:
        ValueError: not 4 bits, outputs that do not fill words, or groups that are not consecutive.
    """
    rows, columns = weight.codes.shape
    expected = consecutive(columns, columns // weight.scales.shape[1], weight.groups.device)
    if weight.bits != 4 or rows % 8 or not torch.equal(weight.groups, expected):
        raise ValueError(f"AWQ's layout needs 4 bits, outputs in eights and consecutive groups, not {weight.bits} bits")
    return {
        "qweight": _awq_words(weight.codes),
        "qzeros": _awq_words(weight.zeros),
        "scales": weight.scales.t().contiguous(),
    }


def from_awq(tensors: Mapping[str, Tensor]) -> Quantized:
    """The inverse of `to_awq`."""
    scales = tensors["scales"].t().contiguous()
    codes, zeros = (awq_codes(tensors[part]).t().contiguous() for part in ("qweight", "qzeros"))
    groups = consecutive(codes.shape[1], codes.shape[1] // scales.shape[1], codes.device)
    return Quantized(codes, scales, zeros, groups, 4)


def _awq_words(codes: Tensor) -> Tensor:
    """[out, n] -> int32 [n, out / 8]."""
    placed = codes.unflatten(0, (-1, 8))[:, list(AWQ_ORDER)].flatten(0, 1)
    return pack(placed.t(), 4)


def awq_codes(words: Tensor) -> Tensor:
    """int32 [n, out / 8] -> uint8 [n, out]."""
    return unpack(words, 4, 8 * words.shape[1]).unflatten(1, (-1, 8))[:, :, list(_AWQ_PLACE)].flatten(1)
