"""The fallback chain: every step is a plan that is whole by itself, and that loads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import toys
import transformers
from conftest import machine

from lowmem.events import CancelToken, WithResult
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.models.catalog import CATALOG, Entry, find
from lowmem.models.source import read_spec
from lowmem.planning import exported, offloading
from lowmem.planning.estimate import estimate, needs_torch, reestimate
from lowmem.planning.fallback import FALLBACKS, WHILE_LOADING, next_fallback, other_memory, remedies, smaller_model
from lowmem.planning.goal import Goal
from lowmem.planning.placement import Placement
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan as make_plan
from lowmem.planning.precision import available
from lowmem.precisions import PRECISIONS
from lowmem.units import GB

MACHINES: tuple[Hardware, ...] = (
    machine(ram_gb=64),
    machine(ram_gb=64, dtypes=("fp32", "bf16")),
    machine(vram_gb=15, ram_gb=32),
    machine(vram_gb=24, ram_gb=16, dtypes=("bf16", "fp16", "fp32"), name="NVIDIA L4"),
)
BUDGETS_GB = (0.6, 1.0, 1.7, 3.0, 6.0, 12.0)
GOALS = (
    Goal(),
    Goal(context=4096, cache_type="ram"),
    Goal(context=32_768, batch=4, precision="fp32"),
    Goal(precision="int4", backend="onnx"),
)


def budget(gb: float) -> MemoryBudget:
    return MemoryBudget(int(gb * GB), int(gb * GB))


def beginnings(entry: Entry, count: int) -> Iterator[Plan]:
    """Plans of a model for random machines, budgets and goals; also offloaded and windowed ones."""
    spec, random = entry.spec(), Random(entry.ref)
    while count:
        hardware, gb, goal = random.choice(MACHINES), random.choice(BUDGETS_GB), random.choice(GOALS)
        if goal.precision != "auto" and available(goal.precision, hardware, "auto", spec):
            continue
        if goal.backend == "onnx" and (hardware.gpus or exported.refusal(spec)):
            continue
        if goal.cache_type == "ram" and not hardware.gpus:
            continue
        first = make_plan(spec, hardware, budget(gb), goal)
        kind = random.choice(("resident", "offloaded", "windowed"))
        if kind == "windowed" and first.backend == "torch":
            first = reestimate(first, window=min(4096, spec.context - 5), sinks=4)
        elif kind == "offloaded":
            first = offloading.offloaded(first) or first
        yield first
        count -= 1


@functools.cache
def steps_of(entry: Entry) -> list[Plan]:
    """The plans of some chains from their beginnings to their ends."""
    found = []
    for number, first in enumerate(beginnings(entry, 4)):
        current: Plan | None = first
        while current is not None:
            found.append(current)
            current = next_fallback(current, (FALLBACKS, WHILE_LOADING)[number % 2])
    return found


def check_whole(plan: Plan) -> None:
    """Nothing in `plan` is left over from another model, device or precision."""
    spec, on_cpu = plan.spec, plan.place.kind == "cpu"
    assert available(plan.precision, plan.hardware, plan.device, spec) is None
    assert plan.backend in PRECISIONS[plan.precision].backends or plan.precision == "stored"
    assert plan.estimates == estimate(plan)
    assert plan.window or plan.context <= spec.context
    assert not plan.window or plan.window + plan.sinks < spec.context
    assert plan.backend == "onnx" or not plan.or_torch
    assert plan.cache_type != "ram" or not on_cpu
    if plan.backend == "onnx":
        assert on_cpu
        assert exported.refusal(spec) is None
        assert not needs_torch(plan)
    if plan.placement is not None:
        assert len(plan.placement.blocks) == spec.layers
        assert set(plan.placement.blocks) <= ({"ram", "disk"} if on_cpu else {"gpu", "ram", "disk"})
        assert PRECISIONS[plan.precision].dtype or plan.precision == "stored"


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.ref.rpartition("/")[2])
def test_every_step_is_planned_whole(entry: Entry) -> None:
    for step in steps_of(entry):
        check_whole(step)
    for remedy in remedies(steps_of(entry)[0]):
        check_whole(remedy)
        assert remedy.verdict != "over"


def test_a_smaller_model_is_not_placed_like_the_larger_one() -> None:
    larger = find("Qwen/Qwen2.5-7B-Instruct")
    first = make_plan(larger.spec(), MACHINES[0], budget(8), Goal(precision="fp32"))
    placed = reestimate(first, placement=Placement(("ram",) * 3 + ("disk",) * 25))
    smaller = smaller_model(placed)
    assert smaller is not None
    assert smaller.placement is None
    assert smaller.verdict != "over"
    assert smaller.main.peak < placed.main.peak


def test_a_smaller_model_has_a_window_that_it_supports() -> None:
    first = make_plan(find("Qwen/Qwen3-4B").spec(), MACHINES[0], budget(2), Goal(precision="int8", backend="torch"))
    windowed = reestimate(first, window=20_000, sinks=4, context=40_000)
    smaller = smaller_model(windowed)
    assert smaller is not None
    assert smaller.window + smaller.sinks < smaller.spec.context


@pytest.mark.parametrize("kind", ["ram", "gpu"])
def test_moving_to_the_cpu_leaves_no_block_on_the_gpu(kind: str) -> None:
    first = make_plan(find("Qwen/Qwen3-4B").spec(), MACHINES[2], budget(6), Goal(precision="fp16", cache_type="ram"))
    placed = reestimate(first, placement=Placement((kind,) * 36))
    moved = other_memory(placed)
    assert moved is not None
    check_whole(moved)


# --- steps are loaded -------------------------------------------------------------------------

_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "n_embd": 64, "n_head": 4, "n_inner": 96, "vocab_size": toys.VOCABULARY,
    "pad_token_id": toys.PAD, "bos_token_id": toys.BOS, "eos_token_id": toys.EOS,
}  # fmt: skip


_TINY_WHERE_NAMED = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "top_k_experts": 2, "global_head_dim": 32, "num_global_key_value_heads": 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": toys.VOCABULARY,
}  # fmt: skip


@functools.cache
def _toy_folder(entry: Entry, root: Path) -> Path:
    """A model with the entry's architecture, layers and tying, 64 numbers wide."""
    named = {key: value for key, value in _TINY_WHERE_NAMED.items() if entry.config.get(key)}
    wanted = {**entry.config, **_TINY, **named, "max_position_embeddings": 256, "n_positions": 256}
    kind = wanted.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **wanted)
    folder = root / entry.ref.replace("/", "--")
    dtype = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[entry.dtype]
    transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return folder


def _on_this_machine(step: Plan) -> Plan:
    """The plan with the memory of a GPU played by RAM."""
    if step.device == "cpu":
        return step
    places = {"gpu": "ram", "ram": "ram", "disk": "disk"}
    placement = step.placement and Placement(tuple(places[place] for place in step.placement.blocks))
    keeps = step.precision in ("fp32", "stored") or not PRECISIONS[step.precision].dtype
    precision = "fp32" if not keeps or placement is not None else "int8"
    return replace(step, device="cpu", precision=precision, placement=placement)


@pytest.mark.parametrize("entry", CATALOG, ids=lambda entry: entry.ref.rpartition("/")[2])
def test_every_step_loads(entry: Entry, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each kind of step that the chain says for a model of the catalog, on models of the same shapes but tiny widths."""
    from lowmem.runtime import loader

    root = tmp_path_factory.getbasetemp()
    tried = set()
    for step in steps_of(entry):
        if step.backend == "torch" and step.verdict != "over":
            here = _on_this_machine(step)
            blocks = here.placement.blocks.count("disk") if here.placement else -1
            case = (here.spec.ref, here.precision, min(blocks, 1))
            if case in tried:
                continue
            tried.add(case)
            folder = _toy_folder(find(here.spec.ref), root)
            spec = read_spec(str(folder))
            assert spec.layers == here.spec.layers
            running = WithResult(loader.load(replace(here, spec=spec), folder, CancelToken()))
            list(running)
            loader.warm_up(running.result)
            running.result.close()
