"""The packed cache of a whole text: what has a scale of its own, what stays exact, and what is rounded only once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowmem.generate.cache.block import DequantizeBuffers
from lowmem.generate.cache.packed import PackedLayer
from lowmem.planning.cache import BLOCK, EXACT_FIRST

HEADS, WIDTH, CAPACITY = 2, 16, 300
BITS = (8, 4, 2)


def states(batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, tokens, WIDTH, generator=generator).to(dtype)
    return keys, values


def layer(bits: int = 4, pads: Sequence[int] = (0,), rows: int = 0) -> PackedLayer:
    return PackedLayer(rows or len(pads), CAPACITY, bits, pads, DequantizeBuffers())


def read(made: PackedLayer, keys: Tensor, values: Tensor, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What the pass after all of `parts` sees of them."""
    for key_part, value_part in zip(keys.split(list(parts), 2), values.split(list(parts), 2), strict=True):
        made.update(key_part, value_part)
    seen = made.update(*states(keys.shape[0], 1, 99))
    return seen[0][:, :, :-1].clone(), seen[1][:, :, :-1].clone()


@pytest.mark.parametrize("bits", BITS)
def test_keys_have_a_scale_per_channel_and_values_one_per_token(bits: int) -> None:
    made, (keys, values) = layer(bits), states(1, 200)
    keys[..., 3] *= 100  # a channel that is large for every token
    values[:, :, 100] *= 100  # and a token that is large in every channel
    got_keys, got_values = read(made, keys, values, [200])
    packed = slice(EXACT_FIRST, 192)
    blocks = keys[:, :, :192].unflatten(2, (3, BLOCK))
    steps = (blocks.amax(3) - blocks.amin(3)) / (2**bits - 1)
    error = (got_keys - keys)[:, :, :192].unflatten(2, (3, BLOCK)).abs().amax(3)
    assert bool((error <= 0.51 * steps + 0.002 * keys.abs().amax((0, 1, 2))).all())
    steps = (values.amax(-1) - values.amin(-1))[:, :, packed] / (2**bits - 1)
    assert bool(((got_values - values)[:, :, packed].abs().amax(-1) <= 0.51 * steps * 1.01 + 0.002).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("parts", [[200], [1] * 200, [70, 1, 60, 69]])
def test_first_and_latest_tokens_are_exact_and_the_others_rounded_once(bits: int, parts: list[int]) -> None:
    made, (keys, values) = layer(bits), states(1, 200)
    seen = read(made, keys, values, parts)
    for got, expected in zip(seen, (keys, values), strict=True):
        for exact in (slice(0, EXACT_FIRST), slice(192, 200)):
            assert torch.equal(got[:, :, exact], expected[:, :, exact])
        assert not torch.equal(got, expected)
    before = [store.clone() for side in made._sides for store in side.packed.stores]
    later = made.update(*states(1, 90, 7))
    for got, earlier in zip(later, seen, strict=True):
        assert torch.equal(got[:, :, :192], earlier[:, :, :192])
    after = [store for side in made._sides for store in side.packed.stores]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, :, :3], old[:, :, :3])


def test_however_a_text_is_cut_the_blocks_are_the_same() -> None:
    keys, values = states(1, 200)
    whole, cut = (read(layer(), keys, values, parts) for parts in ([200], [63, 1, 1, 100, 35]))
    assert torch.equal(whole[0], cut[0])
    assert torch.equal(whole[1], cut[1])


def test_rows_begin_where_their_padding_ends_and_it_does_not_widen_their_blocks() -> None:
    pads, (keys, values) = (0, 70, 150), states(3, 200)
    clean = read(layer(4, pads), keys, values, [100, 100])
    for row, pad in enumerate(pads):
        keys[row, :, :pad], values[row, :, :pad] = 1e4, -1e4
    spoilt = read(layer(4, pads), keys, values, [100, 100])
    for got, unspoilt, expected in zip(spoilt, clean, (keys, values), strict=True):
        for row, pad in enumerate(pads):
            assert torch.equal(got[row, :, pad:], unspoilt[row, :, pad:])
            first = slice(pad, pad + EXACT_FIRST)
            assert torch.equal(got[row, :, first], expected[row, :, first])


def test_rows_are_repeated_and_selected_with_their_beginnings() -> None:
    pads, (keys, values) = (0, 70), states(2, 150)
    made = layer(4, pads, rows=4)
    made.update(keys, values)
    made.batch_repeat_interleave(2)
    made.batch_select_indices(torch.tensor([0, 3]))
    assert made.pads == [0, 70]
    again = layer(4, pads)
    again.update(keys, values)
    for got, expected in zip(made.update(*states(2, 60, 5)), again.update(*states(2, 60, 5)), strict=True):
        assert torch.equal(got, expected)
    made.reorder_cache(torch.tensor([1, 1]))
    got, _ = made.update(*states(2, 1, 6))
    assert torch.equal(got[0, :, :210], got[1, :, :210])


def test_layers_take_turns_in_one_pair_of_buffers_in_their_own_dtype() -> None:
    buffers = DequantizeBuffers()
    first, second = (PackedLayer(1, CAPACITY, 8, (0,), buffers) for _ in range(2))
    keys, values = states(1, 100, 0, torch.bfloat16)
    first.update(keys, values)
    second.update(*states(1, 100, 1, torch.bfloat16))
    again, _ = first.update(*states(1, 1, 2, torch.bfloat16))
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again[:, :, :100], keys, atol=0.03, rtol=0.01)
    assert len(buffers._buffers) == 2


def test_only_tokens_of_the_latest_block_can_be_forgotten_one_by_one() -> None:
    made, (keys, values) = layer(), states(1, 150)
    made.update(keys, values)
    made.crop(140)
    got, _ = made.update(*states(1, 1, 3))
    assert torch.equal(got[:, :, 128:140], keys[:, :, 128:140])
    with pytest.raises(ValueError, match="128 are quantized"):
        made.crop(100)
