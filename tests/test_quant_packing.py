"""Codes in files: every width and odd shapes, against the layouts' own definitions, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lowmem.kernels.packing import (
    AWQ_ORDER,
    from_awq,
    from_gptq,
    pack,
    to_awq,
    to_gptq,
    unpack,
)
from lowmem.kernels.quantized import Quantized, consecutive, largest_code


def codes(rows: int, columns: int, bits: int, lowest: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns + bits)
    return torch.randint(lowest, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


def stream(values: list[int], bits: int) -> list[int]:
    """The definition: one number with the first code in its lowest bits, cut into words."""
    number = sum(value << (bits * index) for index, value in enumerate(values))
    words = -(-len(values) * bits // 32)
    return [(number >> (32 * index)) & 0xFFFFFFFF for index in range(words)]


def quantized(rows: int, columns: int, group: int, bits: int, lowest_zero: int = 0) -> Quantized:
    groups = consecutive(columns, group)
    count = int(groups[-1]) + 1
    scales = (torch.rand(rows, count, generator=torch.Generator().manual_seed(0)) + 0.1).half()
    return Quantized(codes(rows, columns, bits), scales, codes(rows, count, bits, lowest_zero), groups, bits)


def same(a: Quantized, b: Quantized) -> bool:
    pairs = ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.groups, b.groups))
    return a.bits == b.bits and all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (31, 3), (32, 2), (33, 1), (96, 40), (100, 7)])
def test_pack_is_the_stream_and_unpack_its_inverse(bits: int, rows: int, columns: int) -> None:
    original = codes(rows, columns, bits)
    words = pack(original, bits)
    assert (words.to(torch.int64) & 0xFFFFFFFF).tolist() == [stream(row.tolist(), bits) for row in original]
    assert torch.equal(unpack(words, bits, columns), original)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_gptq_layout_round_trip(bits: int, v2: bool, group: int) -> None:
    weight = quantized(40, 96, group, bits, lowest_zero=0 if v2 else 1)
    tensors = to_gptq(weight, v2)
    count = weight.scales.shape[1]
    assert tensors["qweight"].shape == (96 * bits // 32, 40)
    assert tensors["qzeros"].shape == (count, -(-40 * bits // 32))
    assert tensors["scales"].shape == (count, 40)
    assert tensors["g_idx"].shape == (96,)
    assert same(from_gptq(tensors, bits, v2), weight)


@pytest.mark.parametrize(("bits", "stored"), [(2, 0x55555555), (4, 0x77777777), (8, 0x7F7F7F7F)])
def test_symmetric_zero_points_of_v1_are_the_known_constants(bits: int, stored: int) -> None:
    weight = quantized(32, 64, 32, bits)
    middle = torch.full_like(weight.zeros, 2 ** (bits - 1))
    tensors = to_gptq(Quantized(weight.codes, weight.scales, middle, weight.groups, bits), v2=False)
    assert set(tensors["qzeros"].flatten().tolist()) == {stored}


def test_v1_cannot_hold_a_zero_point_of_zero() -> None:
    weight = quantized(32, 64, 32, 4)
    with pytest.raises(ValueError, match="zero point of 0"):
        to_gptq(Quantized(weight.codes, weight.scales, torch.zeros_like(weight.zeros), weight.groups, 4), v2=False)


def test_a_v1_file_of_others_wraps_its_zero_points() -> None:
    tensors = to_gptq(quantized(32, 64, 32, 4), v2=True)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)  # 15 everywhere: zero point 16, read as 0
    assert from_gptq(tensors, 4, v2=False).zeros.eq(0).all()


def test_awq_nibbles_follow_the_gemm_order() -> None:
    weight = quantized(16, 32, 16, 4)
    words = to_awq(weight)["qweight"]
    assert words.shape == (32, 2)
    for row, column in ((0, 0), (31, 1), (17, 0)):
        nibbles = [(int(words[row, column]) >> (4 * place)) & 15 for place in range(8)]
        assert nibbles == [int(weight.codes[8 * column + place, row]) for place in AWQ_ORDER]


@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 24, 8), (40, 96, 32), (24, 30, -1)])
def test_awq_layout_round_trip(rows: int, columns: int, group: int) -> None:
    weight = quantized(rows, columns, group, 4)
    assert same(from_awq(to_awq(weight)), weight)


@pytest.mark.parametrize("v2", [False, True])
def test_awq_and_gptq_convert_into_each_other(v2: bool) -> None:
    weight = quantized(40, 96, 32, 4, lowest_zero=1)
    gptq, awq = to_gptq(weight, v2), to_awq(weight)
    converted = to_gptq(from_awq(awq), v2)
    assert all(torch.equal(converted[name], gptq[name]) for name in gptq)
    back = to_awq(from_gptq(gptq, 4, v2))
    assert all(torch.equal(back[name], awq[name]) for name in awq)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_awq_refuses_what_its_layout_cannot_hold(bits: int) -> None:
    with pytest.raises(ValueError, match="4 bits"):
        to_awq(quantized(16, 32, 16, bits))


def test_groups_out_of_order_are_refused_by_awq_and_kept_by_gptq() -> None:
    weight = quantized(16, 64, 32, 4)
    shuffled = Quantized(weight.codes, weight.scales, weight.zeros, weight.groups.flip(0), 4)
    with pytest.raises(ValueError, match="consecutive"):
        to_awq(shuffled)
    restored = from_gptq(to_gptq(shuffled, v2=True), 4, v2=True)
    assert torch.equal(restored.dequantize(), shuffled.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantized_codes_stay_on_their_grid(bits: int) -> None:
    weight = quantized(8, 64, 16, bits)
    by_hand = (
        weight.codes.float() - weight.zeros.float().repeat_interleave(16, 1)
    ) * weight.scales.float().repeat_interleave(16, 1)
    assert torch.equal(weight.dequantize(), by_hand)
    assert int(weight.codes.max()) <= largest_code(bits)
