"""Cache layers against transformers' own: contents, memory, rows that are copied, dropped and reordered."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import NAMES, WINDOW, config, prompt, toy
from transformers import DynamicCache, MambaConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lowmem.errors import Unsupported
from lowmem.generate.kv import DummyLayer, FullLayer, Int8Layer, Scratch, make_cache, quantize

HEADS, WIDTH = 2, 16


def states(batch: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, tokens, WIDTH, generator=generator).to(dtype)
    return keys, values


def fill(layer: object, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    for seed, tokens in enumerate((5, 1, 1, 4)):
        result = layer.update(*states(batch, tokens, seed))
    return result


def test_the_layer_returns_what_a_growing_one_does() -> None:
    ours, theirs = FullLayer(3, 20), DynamicLayer()
    for got, expected in zip(fill(ours), fill(theirs), strict=True):
        assert torch.equal(got, expected)
    assert ours.get_seq_length() == theirs.get_seq_length() == 11
    assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)


def test_history_is_written_in_place_and_never_copied() -> None:
    layer = FullLayer(1, 20)
    first, _ = layer.update(*states(1, 5, 0))
    later, _ = layer.update(*states(1, 1, 1))
    assert first.data_ptr() == later.data_ptr()
    assert layer.keys.numel() == HEADS * 20 * WIDTH


@pytest.mark.parametrize("kind", ["full", "int8"])
def test_rows_are_repeated_selected_and_reordered_like_those_of_a_growing_layer(kind: str) -> None:
    ours = FullLayer(6, 20) if kind == "full" else Int8Layer(6, 20, Scratch())
    theirs = DynamicLayer()
    fill(ours), fill(theirs)
    tolerance = 0.0 if kind == "full" else 0.02
    changes = [("batch_repeat_interleave", 2), ("reorder_cache", torch.tensor([5, 0, 3, 3, 1, 4]))]
    changes.append(("batch_select_indices", torch.tensor([0, 2, 5])))
    for seed, (change, argument) in enumerate(changes):
        getattr(ours, change)(argument)
        getattr(theirs, change)(argument)
        new = states(theirs.keys.shape[0], 1, 50 + seed)
        for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_quantization_errs_by_half_a_step_at_most() -> None:
    keys, _ = states(2, 50, 0)
    codes, scales = quantize(keys)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    steps = keys.abs().amax(dim=-1, keepdim=True) / 127
    # fp16 rounds the step itself by up to 2**-11, seen at 127 steps.
    assert ((codes * scales.float() - keys).abs() <= steps * (0.5 + 127 * 2**-11)).all()
    zero_codes, zero_scales = quantize(torch.zeros(1, 1, 1, WIDTH))
    assert not zero_codes.any()
    assert zero_scales.isfinite().all()


def stored_bytes(layer: FullLayer) -> int:
    return sum(store.nbytes for store in layer._stores())


def test_memory_is_what_the_docstrings_say() -> None:
    rows, capacity = 3, 20
    full, scratch = FullLayer(rows, capacity), Scratch()
    small = [Int8Layer(rows, capacity, scratch) for _ in range(4)]
    for layer in (full, *small):
        fill(layer)
    assert stored_bytes(full) == 2 * HEADS * WIDTH * rows * capacity * 4
    assert [stored_bytes(layer) for layer in small] == [2 * HEADS * (WIDTH + 2) * rows * capacity] * 4
    assert sum(buffer.nbytes for buffer in scratch._buffers.values()) == stored_bytes(full)


def test_layers_take_turns_in_one_scratch_and_new_tokens_are_exact() -> None:
    scratch = Scratch()
    first, second = Int8Layer(1, 8, scratch), Int8Layer(1, 8, scratch)
    keys, values = states(1, 3, 0, torch.bfloat16)
    got, _ = first.update(keys, values)
    assert torch.equal(got, keys)
    second.update(*states(1, 3, 1, torch.bfloat16))
    again, _ = first.update(*states(1, 1, 2, torch.bfloat16))
    assert again.dtype == torch.bfloat16
    torch.testing.assert_close(again[:, :, :3], keys, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv", ["same", "int8"])
def test_logits_with_our_cache_are_those_with_transformers_own(name: str, kv: str) -> None:
    model = toy(name)
    ids = torch.tensor([prompt(3 * WINDOW), prompt(3 * WINDOW, 1)])

    def logits(cache: Cache) -> torch.Tensor:
        parts = (ids[:, :20], ids[:, 20:40], ids[:, 40:41], ids[:, 41:42], ids[:, 42:])
        with torch.inference_mode():
            return torch.cat(
                [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
            )

    exact = logits(DynamicCache(config=model.config))
    ours = logits(make_cache(model.config, rows=2, capacity=64, kv=kv))
    if kv == "same":
        torch.testing.assert_close(ours, exact)
    else:
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_sliding_layers_stay_transformers_own() -> None:
    mixed = make_cache(config("gemma3"), rows=1, capacity=8, kv="int8")
    assert [type(layer) for layer in mixed.layers] == [DynamicSlidingWindowLayer, Int8Layer]
    assert {type(layer) for layer in make_cache(config("llama"), rows=1, capacity=8).layers} == {FullLayer}


def test_other_memories_are_refused() -> None:
    with pytest.raises(Unsupported, match="mamba") as caught:
        make_cache(MambaConfig(num_hidden_layers=2), rows=1, capacity=8)
    assert "KV cache off" in caught.value.hint


def test_layers_that_share_keys_are_refused_in_int8_only() -> None:
    sharing = copy.deepcopy(config("llama"))
    sharing.kv_sharing_modes = ["store", "reuse"]
    assert [type(layer) for layer in make_cache(sharing, rows=1, capacity=8).layers] == [
        FullLayer,
        DummyLayer or FullLayer,
    ]
    with pytest.raises(Unsupported, match="share keys"):
        make_cache(sharing, rows=1, capacity=8, kv="int8")
