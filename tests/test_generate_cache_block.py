"""PackedBlocks keys and values: what they lose, what they take, and that they do not change what is remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate_cache_window import GREEDY, other, ours, windowed_logits
from toys import prompt, save_toy, toy
from transformers import DynamicCache

from lowmem.events import Completion
from lowmem.generate.cache import policy
from lowmem.generate.cache.block import BlockLayer, pack, quantize, unpack
from lowmem.generate.cache.packed import PackedLayer
from lowmem.generate.options import GenerateOptions
from lowmem.generate.rows import Rows
from lowmem.models.anatomy import LayerCache
from lowmem.offload.run import BlockPlacement, plan_for, run
from lowmem.planning.cache import BLOCK, block_bytes
from lowmem.planning.goal import Goal
from lowmem.runtime.session import Session


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_packed_comes_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 16, 5), dtype=torch.uint8)
    out = torch.empty(3, 16, 5)
    unpack(pack(codes, bits), bits, out)
    assert torch.equal(out, codes.float())


@pytest.mark.parametrize(("bits", "over"), [(8, -1), (4, -2), (2, -1)])
def test_rounding_is_within_half_a_step(bits: int, over: int) -> None:
    states = torch.randn(2, 3, 64, 16)
    codes, scales, lows = quantize(states, bits, over)
    assert scales.dtype == lows.dtype == torch.float16
    error = (lows.float() + scales.float() * codes - states).abs()
    assert bool((error <= 0.51 * scales.float() + 2e-3).all())


def full_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), past_key_values=DynamicCache(config=model.config)).logits


def bloom() -> Any:
    return other("BloomConfig", n_layer=2, n_head=4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "phi", "bloom"])
@pytest.mark.parametrize(("kv", "error"), [("int8", 0.02), ("int4", 0.2), ("int2", 0.95)])
def test_logits_stay_near_the_exact_ones(name: str, kv: str, error: float) -> None:
    model, ids = bloom() if name == "bloom" else toy(name), prompt(300)
    expected = full_logits(model, ids)
    cache = policy.make_cache(model, replace(GREEDY, cache_type=kv), rows=1, capacity=300, pads=[0])
    with torch.inference_mode():
        found = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in torch.tensor([ids]).split([100, 1, 1, 100, 98], dim=1)
        ]
    got = torch.cat(found, dim=1)
    torch.testing.assert_close(got[:, :100], expected[:, :100], atol=1e-4, rtol=1e-4)
    assert (got - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("chunk", [1, 40])
def test_eight_bits_with_a_window_are_the_exact_window_but_for_rounding(chunk: int) -> None:
    model, ids, options = toy("llama"), prompt(400), replace(GREEDY, sinks=4, window=150)
    exact = windowed_logits(model, [ids], options, chunk)
    rounded = windowed_logits(model, [ids], replace(options, cache_type="int8"), chunk)
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_positions_that_come_back_change_nothing_but_rounding(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, options = toy("llama"), prompt(500), replace(GREEDY, sinks=4, window=100, cache_type=kv)
    expected = windowed_logits(model, [ids], options, 1)
    monkeypatch.setattr(policy, "position_limit", lambda _config: 160)
    got = windowed_logits(model, [ids], options, 1)
    assert (got - expected).norm() < (0.02 if kv == "int8" else 0.4) * expected.norm()


def last_logits(model: Any, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> torch.Tensor:
    rows = Rows(model, prompts, options)
    with torch.inference_mode():
        return [rows.logits(start, end) for start, end in rows.parts(64)][-1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(
    "fields", [{"cache_type": "int8"}, {"cache_type": "int4"}, {"cache_type": "int8", "window": 100}]
)
def test_unequal_rows_of_a_batch_are_near_what_they_are_alone(name: str, fields: dict[str, Any]) -> None:
    model, options = bloom() if name == "bloom" else toy(name), replace(GREEDY, **fields)
    prompts = [prompt(150), prompt(3, 1), prompt(90, 2)]
    for row, one in zip(last_logits(model, prompts, options), prompts, strict=True):
        (alone,) = last_logits(model, [one], options)
        assert (row - alone).norm() < (0.05 if options.cache_type == "int8" else 0.4) * alone.norm()


@pytest.mark.parametrize("kv", ["int8", "int2"])
def test_a_window_computed_anew_goes_through_packed_layers_too(kv: str) -> None:
    options = replace(GREEDY, window=100, cache_type=kv, max_new_tokens=150)
    together = ours(toy("gpt2"), [prompt(150), prompt(90, 2)], options)
    assert [len(text) for text in together] == [150, 150]
    assert together[0][0] == ours(toy("gpt2"), [prompt(150)], options)[0][0]


def test_rows_that_end_leave_the_others_alone() -> None:
    options = GenerateOptions(max_new_tokens=120, sinks=4, window=80, cache_type="int4", num_return_sequences=3, seed=3)
    three = ours(toy("llama"), [prompt(100)], options)
    alone = [
        ours(toy("llama"), [prompt(100)], replace(options, num_return_sequences=1, seed=seed))[0] for seed in (3, 4, 5)
    ]
    assert three == alone


@pytest.mark.parametrize(("bits", "share"), [(8, 0.57), (4, 0.32), (2, 0.20)])
def test_bytes_are_what_the_planner_says(bits: int, share: float) -> None:
    model = toy("llama")
    cache = policy.make_cache(model, replace(GREEDY, cache_type=f"int{bits}"), rows=1, capacity=4096, pads=[0])
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt(8)]), past_key_values=cache, use_cache=True)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer)
    packed = sum(store.nbytes for side in layer._sides for store in side.packed.stores)

    assert packed == 4096 // BLOCK * block_bytes(LayerCache(2, 16, 16), bits)
    assert block_bytes(LayerCache(3, 64, 64), bits) <= share * BLOCK * 2 * 3 * 64 * 2


def test_a_block_of_a_window_is_quantized_once_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    retire = BlockLayer._quantize_latest
    monkeypatch.setattr(
        BlockLayer, "_quantize_latest", lambda self, block: (made.append(block), retire(self, block))[1]
    )
    ours(toy("llama"), [prompt(200)], replace(GREEDY, cache_type="int4", window=100, max_new_tokens=100))
    assert sorted(made) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "fields", [{"cache_type": "int8"}, {"cache_type": "int4"}, {"cache_type": "int2", "window": 64}]
)
def test_streamed_blocks_write_the_same_through_packed_caches(fields: dict[str, Any], tmp_path: Path) -> None:
    save_toy("llama", tmp_path)
    options = replace(GREEDY, unbounded=True, max_new_tokens=150, **fields)
    texts = []
    for where in (BlockPlacement(ram=()), BlockPlacement(disk=(0, 1), may_map=False)):
        session = Session()
        plan = plan_for(session, str(tmp_path), Goal(context=300, precision="fp32"), placement=where)
        events = run(session, plan, ["An old map", "A river"], options, raw=True, force=True)
        texts.append([event for event in events if isinstance(event, Completion)])
        session.unload()
    assert len(texts[0]) == 2
    assert [one.text for one in texts[0]] == [one.text for one in texts[1]]
