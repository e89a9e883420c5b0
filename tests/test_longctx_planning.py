"""Windows and packed caches as the planner prices them, against the bytes of the layers themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import machine
from test_generate_cache_window import GREEDY
from toys import prompt, save_toy, toy

from lowmem.generate.cache import policy
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import context_of
from lowmem.longctx.estimates import window_plan
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.planning.cache import kv_bytes
from lowmem.planning.estimate import reestimate
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return read_spec(str(save_toy("llama", tmp_path_factory.mktemp("toy"))))


def held(options: GenerateOptions, capacity: int) -> int:
    model = toy("llama")
    cache = policy.make_cache(model, options, rows=1, capacity=capacity, pads=[0])
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt(4)]), past_key_values=cache, use_cache=True)
    return sum(store.nbytes for layer in cache.layers for store in layer._stores())


@pytest.mark.parametrize("kv", ["same", "int8", "int4", "int2"])
def test_a_window_costs_what_its_layers_hold_however_long_the_text(kv: str, spec: ModelSpec) -> None:
    options = GenerateOptions(window=200, sinks=4, cache_type=kv)
    expected = held(options, 0)
    for context in (1_000, 1_000_000):
        assert kv_bytes(spec, context, 1, "fp32", kv, window=200, sinks=4) == expected
    assert kv_bytes(spec, 1000, 3, "fp32", kv, window=200, sinks=4) == 3 * expected


@pytest.mark.parametrize("kv", ["int8", "int4", "int2"])
def test_packed_caches_cost_what_their_layers_hold(kv: str, spec: ModelSpec) -> None:
    for capacity in (64, 300, 512):
        assert kv_bytes(spec, capacity, 1, "fp32", kv) == held(GenerateOptions(cache_type=kv), capacity)


def test_plans_with_a_window_do_not_grow_with_the_text(spec: ModelSpec) -> None:
    hardware = machine()
    first = plan(spec, hardware, MemoryBudget.detect(hardware), Goal(precision="fp32"))
    peaks = [reestimate(first, context=context, window=64, sinks=4).main.peak for context in (10_000, 10_000_000)]
    assert peaks[0] == peaks[1] < reestimate(first, context=10_000).main.peak
    assert context_of(512, GREEDY) == 512
    assert context_of(512, GenerateOptions(window=64)) > 10**9


def test_windows_share_a_pass_where_memory_allows(spec: ModelSpec) -> None:
    hardware = machine()
    roomy = plan(spec, hardware, MemoryBudget.detect(hardware), Goal(precision="fp32", backend="torch"))
    shared, alone = window_plan(roomy, 64, 5000), window_plan(roomy, 64, 64)
    assert (shared.context, alone.context) == (512, 64)
    between = (shared.main.peak + alone.main.peak) // 2
    limits = MemoryBudget(between).bounded(hardware)
    tight = window_plan(plan(spec, hardware, limits, Goal(precision="fp32", backend="torch")), 64, 5000)
    assert (tight.context, tight.verdict) != (512, "over")
    assert tight.context == 64
