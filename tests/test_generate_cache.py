"""Cache layers against transformers' own: contents, memory, rows that are copied, dropped and reordered."""

from __future__ import annotations

import copy

import pytest
import torch
from toys import NAMES, WINDOW, config, prompt, toy
from transformers import DynamicCache, MambaConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lowmem.errors import Unsupported
from lowmem.generate.cache.factory import make_cache
from lowmem.generate.cache.full import DummyLayer, FullLayer
from lowmem.generate.cache.packed import PackedLayer
from lowmem.generate.cache.state import StateLayer

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


def test_rows_are_repeated_selected_and_reordered_like_those_of_a_growing_layer() -> None:
    ours, theirs = FullLayer(6, 20), DynamicLayer()
    fill(ours), fill(theirs)
    changes = [("batch_repeat_interleave", 2), ("reorder_cache", torch.tensor([5, 0, 3, 3, 1, 4]))]
    changes.append(("batch_select_indices", torch.tensor([0, 2, 5])))
    for seed, (change, argument) in enumerate(changes):
        getattr(ours, change)(argument)
        getattr(theirs, change)(argument)
        new = states(theirs.keys.shape[0], 1, 50 + seed)
        for got, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(got, expected)


def test_memory_is_what_the_docstring_says() -> None:
    rows, capacity = 3, 20
    layer = FullLayer(rows, capacity)
    fill(layer)
    assert sum(store.nbytes for store in layer._stores()) == 2 * HEADS * WIDTH * rows * capacity * 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv", ["same", "int8"])
def test_logits_with_our_cache_are_those_with_transformers_own(name: str, kv: str) -> None:
    model = toy(name)
    ids = torch.tensor([prompt(3 * WINDOW + 60), prompt(3 * WINDOW + 60, 1)])

    def logits(cache: Cache) -> torch.Tensor:
        parts = ids.split([20, 60, 1, 1, ids.shape[1] - 82], dim=1)
        with torch.inference_mode():
            return torch.cat(
                [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], dim=1
            )

    exact = logits(DynamicCache(config=model.config))
    ours = logits(make_cache(model.config, rows=2, capacity=ids.shape[1], cache_type=kv))
    if kv == "same":
        torch.testing.assert_close(ours, exact)
    else:
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_sliding_layers_stay_transformers_own() -> None:
    mixed = make_cache(config("gemma3"), rows=1, capacity=8, cache_type="int8")
    assert [type(layer) for layer in mixed.layers] == [DynamicSlidingWindowLayer, PackedLayer]
    assert {type(layer) for layer in make_cache(config("llama"), rows=1, capacity=8).layers} == {FullLayer}


def test_recurrent_layers_keep_a_state() -> None:
    assert {type(layer) for layer in make_cache(MambaConfig(num_hidden_layers=2), rows=1, capacity=8).layers} == {
        StateLayer
    }


def test_unknown_kinds_of_layers_are_refused() -> None:
    odd = copy.deepcopy(config("llama"))
    odd.layer_types = ["full_attention", "telepathy"]
    with pytest.raises(Unsupported, match="llama") as caught:
        make_cache(odd, rows=1, capacity=8)
    assert "KV cache off" in caught.value.hint


def test_layers_that_share_keys_are_refused_in_fewer_bits_only() -> None:
    sharing = copy.deepcopy(config("llama"))
    sharing.kv_sharing_modes = ["store", "reuse"]
    assert [type(layer) for layer in make_cache(sharing, rows=1, capacity=8).layers] == [
        FullLayer,
        DummyLayer or FullLayer,
    ]
    for kv in ("int8", "int2"):
        with pytest.raises(Unsupported, match="share keys"):
            make_cache(sharing, rows=1, capacity=8, cache_type=kv)
