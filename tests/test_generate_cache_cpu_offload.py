"""A KV cache that waits in RAM gives what one on the device gives, and is counted where it lies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toys
from conftest import machine
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowmem.events import CancelToken
from lowmem.generate.cache.cpu_offload import LayerPrefetcher, OffloadedLayer
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.device import Device
from lowmem.models.catalog import synthetic
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan


@pytest.fixture
def deep() -> PreTrainedModel:
    """More layers than there are buffers."""
    config = toys.config("llama")
    config.num_hidden_layers = 5
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def tokens(model: PreTrainedModel, options: GenerateOptions) -> list[tuple[int | None, ...]]:
    prompts = [toys.prompt(11), toys.prompt(7, seed=1)]
    events = decode(model, prompts, options, eos_ids=frozenset({5, 6, 7}), cancel=CancelToken())
    return [event.ids for event in events if isinstance(event, Tokens)]


@pytest.mark.parametrize(
    "changes", [{}, {"num_return_sequences": 3, "temperature": 2.0, "seed": 1}, {"prefill_chunk": 16}]
)
def test_tokens_are_those_of_a_cache_on_the_device(deep: PreTrainedModel, changes: dict[str, object]) -> None:
    options = GenerateOptions(max_new_tokens=12, greedy="seed" not in changes, **changes)  # type: ignore[arg-type]
    assert tokens(deep, dataclasses.replace(options, cache_type="ram")) == tokens(deep, options)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "phi"])
def test_families(name: str) -> None:
    options = GenerateOptions(max_new_tokens=8, greedy=True)
    assert tokens(toys.toy(name), dataclasses.replace(options, cache_type="ram")) == tokens(toys.toy(name), options)


def test_two_buffers_serve_every_layer() -> None:
    prefetcher = LayerPrefetcher()
    layers = [OffloadedLayer(1, 8, prefetcher) for _ in range(4)]
    seen = set()
    for _ in range(3):
        for layer in layers:
            keys, _ = layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
            seen.add(keys.data_ptr())
    assert len(seen) == 2
    assert all(layer.keys.data_ptr() not in seen for layer in layers)


def test_a_gpus_cache_in_ram_is_counted_in_ram() -> None:
    gpu = Device("cuda:0", "T4", 15_000_000_000, 15_000_000_000, ("fp16", "fp32"))
    hardware = dataclasses.replace(machine(), gpus=(gpu,))
    spec = synthetic(layers=16, hidden=1024, intermediate=2048, heads=16)
    limits = MemoryBudget(12_000_000_000, 14_000_000_000)
    here, there = (
        plan(spec, hardware, limits, Goal(context=4096, precision="fp16", cache_type=kv)) for kv in ("same", "ram")
    )
    assert there.estimate("vram").share("kv") == here.estimate("vram").share("kv") // 8  # type: ignore[union-attr]
    assert there.estimate("ram").share("kv") == here.estimate("vram").share("kv")  # type: ignore[union-attr]
