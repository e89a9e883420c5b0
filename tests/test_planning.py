"""Estimates, the automatic choice and the ladder, on made-up machines and the catalog's shapes."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest

from lowmem.errors import BadInput
from lowmem.kernels import layouts
from lowmem.machine.budget import MemoryBudget
from lowmem.models.catalog import CATALOG, find, synthetic
from lowmem.planning import exported
from lowmem.planning.cache import kv_bytes
from lowmem.planning.estimate import reestimate
from lowmem.planning.fallback import FALLBACKS, fall_back, next_fallback, remedies
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import bytes_per_token, weight_bytes
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.planning.precision import available, candidates
from lowmem.units import GB, MB

DEMO = find("demo").spec()
LLAMA7B = find("meta-llama/Llama-2-7b-hf").spec()
MISTRAL7B = find("mistralai/Mistral-7B-Instruct-v0.3").spec()


def chosen(hardware, spec=None, **goal) -> Plan:
    return plan(spec, hardware, MemoryBudget.detect(hardware), Goal(**goal))


# --- estimates -------------------------------------------------------------------------------


def test_fp32_weights_are_four_bytes_a_parameter():
    assert weight_bytes(DEMO, "fp32", "fp32") == 4 * DEMO.parameters == 538_060_032


def test_nf4_counts_embeddings_in_half_precision():
    """Llama-2-7B: 6.48 billion linear weights at 4.127 bits, 262 million embedding weights at 16."""
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    other = LLAMA7B.parameters - linear
    expected = linear / 2 + linear / 64 * (1 + 4 / 256) + 2 * other
    assert weight_bytes(LLAMA7B, "nf4", "fp16") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("vnni", "last"), [(False, 512), (True, 4096 / 48)])
def test_int8_packs_columns_in_tiles_of_512_and_keeps_a_tied_embedding_once(
    monkeypatch: pytest.MonkeyPatch, vnni: bool, last: float
):
    """With VNNI the 64 columns of the last tile fill one page of 48 rows, and the others stay empty."""
    monkeypatch.setattr(layouts, "has_vnni", lambda: vnni)
    linear = sum(
        rows * (columns // 512 * 512 + (math.ceil(last) if columns % 512 else 0) + 12)
        for rows, columns in _demo_linears()
    )
    embedding = 49152 * (576 + 4)
    norms = 4 * (2 * 30 + 1) * 576
    assert weight_bytes(DEMO, "int8", "fp32") == linear + embedding + norms


def _demo_linears():
    for _ in range(30):
        yield from ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def test_stored_masks_of_gpt2_are_not_weights():
    gpt2 = find("openai-community/gpt2").spec()
    assert gpt2.size_on_disk > 4 * gpt2.parameters
    assert weight_bytes(gpt2, "fp32", "fp32") == 4 * gpt2.parameters


def test_kv_cache_of_llama3_8b_costs_one_gib_per_8k_tokens():
    spec = synthetic(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, vocab=128256, context=8192)
    assert kv_bytes(spec, 8192, 1, "fp16", "same") == 2**30
    scales, exact = 4 * 128 + 4 * 64, 2 * (64 + 4)  # of a block and head; tokens that stay as they are
    assert kv_bytes(spec, 8192, 1, "fp16", "int8") == 2**29 + 32 * 8 * (128 * scales + exact * 128 * 2)
    assert kv_bytes(spec, 8192, 3, "fp16", "none") == 0


def test_sliding_layers_stop_growing():
    gemma = find("google/gemma-3-1b-it").spec()
    full = sum(kind == "full" for kind in gemma.layer_types)
    window = gemma.sliding_window
    per_token = 2 * gemma.kv_heads * gemma.head_dim * 2
    grown = kv_bytes(gemma, 10 * window, 1, "fp16", "same") - kv_bytes(gemma, 9 * window, 1, "fp16", "same")
    assert grown == full * per_token * window


@pytest.mark.parametrize("change", [{"context": 8192}, {"batch": 4}, {"precision": "fp32"}, {"prefill_chunk": 1024}])
def test_more_of_anything_costs_more(made_up, change):
    base = chosen(made_up(ram_gb=64), DEMO, precision="bf16", context=4096, batch=2)
    assert reestimate(base, **change).main.peak > base.main.peak


def test_every_line_of_a_budget_is_explained(made_up):
    for budget in chosen(made_up(vram_gb=8), LLAMA7B).estimates:
        assert all(line.why.endswith(".") and line.count >= 0 for line in budget.lines)
        assert budget.peak == sum(line.count for line in budget.lines)


# --- the automatic choice --------------------------------------------------------------------


QUALITY = {entry.ref: entry.quality for entry in CATALOG}


@pytest.mark.parametrize(
    ("vram_gb", "precision"),
    [
        (6, "nf4"),  # the course: 6 GB runs a 7B in 4 bits
        (8, "nf4"),
        (12, "bnb8"),  # the course: 12 GB runs a 7B in 8 bits
        (15, "bnb8"),
        (24, "fp16"),
    ],
)
def test_the_courses_rule_is_the_floor(made_up, vram_gb, precision):
    seven = chosen(made_up(vram_gb=vram_gb), MISTRAL7B)
    assert (seven.verdict, seven.precision) == ("fits", precision)
    best = chosen(made_up(vram_gb=vram_gb))
    assert best.verdict == "fits"
    assert QUALITY[best.spec.ref] > QUALITY[MISTRAL7B.ref]


@pytest.mark.parametrize(
    ("vram_gb", "least"),
    # The best rank among published ones whose 4-bit weights are about two thirds of the memory.
    [(1, 29), (2, 44), (4, 50), (6, 60), (8, 60), (12, 62), (16, 62), (24, 71)],
)
def test_a_current_model_is_chosen_for_each_size(made_up, vram_gb, least):
    best = chosen(made_up(vram_gb=vram_gb, ram_gb=16))
    assert best.verdict == "fits"
    assert QUALITY[best.spec.ref] >= least


def test_more_memory_never_chooses_a_worse_model(made_up):
    ranks = [QUALITY[chosen(made_up(vram_gb=gb)).spec.ref] for gb in (2, 3, 4, 5, 6, 8, 10, 12, 15, 24, 48)]
    assert ranks == sorted(ranks)


def test_where_no_model_fits_the_gpu_the_cpu_runs_the_best_that_fits_there(made_up):
    best = chosen(made_up(vram_gb=0.3, ram_gb=16))
    assert (best.device, best.verdict) == ("cpu", "fits")
    assert best.reason.startswith("No model fits the GPU. The best model that fits")
    assert best.spec == chosen(made_up(ram_gb=16)).spec


def test_a_mixture_is_fast_enough_for_a_cpu_by_what_a_token_reads(made_up):
    """LFM2.5-8B-A1B has 8.5 GB of weights in 8 bits, of which a token reads 1.5."""
    best = chosen(made_up(ram_gb=32))
    assert best.spec.name == "LFM2.5-8B-A1B"
    assert best.main.share("weights") > 4 * GB > 2 * GB > bytes_per_token(best.spec, best.precision, "fp32")


def test_kv_cache_decides_too(made_up):
    """Llama-2 without grouped queries needs half a megabyte a token: 4-bit weights alone would mislead."""
    machine = made_up(vram_gb=6)
    assert chosen(machine, LLAMA7B, context=2048).verdict != "over"
    assert chosen(machine, LLAMA7B, context=4096).verdict == "over"


def test_two_core_space_gets_a_model_it_can_decode_at_reading_speed(made_up):
    best = chosen(made_up(ram_gb=16, host="space"))
    assert (best.device, best.precision) == ("cpu", "int8")
    assert best.verdict == "fits"
    on_onnx = best.backend == "onnx"
    read = exported.graph_bytes if on_onnx else functools.partial(bytes_per_token, dtype="fp32")
    assert read(best.spec, best.precision) <= 2 * GB
    assert any("Too slow" in declined.reason for declined in best.declined)


def test_a_phones_memory_still_gets_a_model(made_up):
    best = chosen(made_up(ram_gb=2))
    assert best.verdict == "fits"
    assert best.main.peak < 2 * GB


def test_nothing_fits_is_said_with_the_smallest_plan(made_up):
    best = chosen(made_up(ram_gb=0.6, process_mb=50))
    assert best.verdict == "over"
    assert "smallest" in best.reason
    assert "Nothing fits" in best.reason
    assert "more than the budget" in best.sentence()


def test_what_fits_with_less_context_is_not_said_not_to_fit(made_up):
    hardware = made_up(ram_gb=2, process_mb=50)
    found = [plan(None, hardware, MemoryBudget(megabytes * MB).bounded(hardware)) for megabytes in range(400, 900, 10)]
    shortened = [best for best in found if best.verdict != "over" and "shortened" in best.reason]
    assert shortened
    assert not [best for best in shortened if "Nothing fits" in best.reason]


def test_the_choice_is_explained_and_the_alternatives_say_why_not(made_up):
    best = chosen(made_up(vram_gb=6))
    assert best.spec.name in best.reason or "best model" in best.reason
    assert best.declined
    assert all(declined.reason.endswith(".") for declined in best.declined)
    assert best.spec.name not in {declined.choice for declined in best.declined}


def test_gated_models_are_not_recommended(made_up):
    gated = {entry.ref for entry in CATALOG if entry.gated}
    for gb in (2, 4, 6, 8, 12, 24):
        assert chosen(made_up(vram_gb=gb)).spec.ref not in gated


def test_context_grows_only_while_it_fits(made_up):
    best = chosen(made_up(vram_gb=24))
    assert best.context == 8192
    assert chosen(made_up(vram_gb=6)).context >= 2048


def test_the_models_own_context_is_the_most(made_up):
    assert chosen(made_up(ram_gb=64), DEMO, context=100_000).context == DEMO.context


@pytest.mark.parametrize(
    "goal",
    [
        {"context": 0},
        {"context": 10**9},
        {"batch": 0},
        {"precision": "int3"},
        {"device": "tpu"},
        {"cache_type": "int1"},
        {"prefill_chunk": -5},
    ],
)
def test_senseless_goals_are_refused_with_the_value(made_up, goal):
    with pytest.raises(BadInput) as caught:
        chosen(made_up(), DEMO, **goal)
    assert caught.value.hint


def test_refused_precisions_say_why(made_up):
    t4, cpu = made_up(vram_gb=15), made_up()
    assert "bf16" in available("bf16", t4)
    assert "CPU" in available("int8", t4)
    assert "CPU" in available("fp16", cpu)
    assert available("fp32", cpu) is None
    assert candidates(cpu, cpu.cpu)[0] in ("int8", "bf16")


# --- limits ----------------------------------------------------------------------------------


def test_limits_leave_a_reserve_and_can_only_be_lowered(made_up):
    machine = made_up(vram_gb=15, ram_gb=12.7)
    detected = MemoryBudget.detect(machine)
    assert 0.9 * 15 * GB < detected.vram < 15 * GB
    assert MemoryBudget(vram=4 * GB).bounded(machine).vram == 4 * GB
    assert MemoryBudget(vram=400 * GB).bounded(machine) == detected
    with pytest.raises(BadInput, match="100 MB"):
        MemoryBudget.parse("5M")


def test_what_the_process_holds_already_is_ours_to_use(made_up):
    """The resident model makes room for the next one, so it must not count as taken."""
    idle, loaded = made_up(process_mb=100), made_up(process_mb=4000)
    assert MemoryBudget.detect(loaded).ram == MemoryBudget.detect(idle).ram


# --- the ladder ------------------------------------------------------------------------------


def test_rungs_come_in_order_and_each_saves_memory(made_up):
    machine = made_up(vram_gb=15)
    current = reestimate(chosen(machine, LLAMA7B, precision="fp16", context=4096), batch=1)
    seen = []
    while (lower := next_fallback(current)) is not None and len(seen) < 40:
        seen.append(lower.reason)
        assert lower.device != current.device or lower.main.peak < current.main.peak
        current = lower
    kinds = [
        next(i for i, word in enumerate(("Context", "KV", "Weights", "Moved", "instead of")) if word in r) for r in seen
    ]
    assert kinds[:3] == [0, 0, 0]
    assert 1 in kinds
    assert 2 in kinds
    assert 3 in kinds
    assert kinds.index(1) < kinds.index(2) < kinds.index(3)


def test_every_rung_ends(made_up):
    for rung in FALLBACKS:
        current, steps = chosen(made_up(vram_gb=24), LLAMA7B, precision="fp16"), 0
        while current is not None and steps < 50:
            current, steps = rung(current), steps + 1
        assert current is None


def test_descend_stops_as_soon_as_it_fits(made_up):
    tight = chosen(made_up(vram_gb=6), LLAMA7B, context=4096)
    assert tight.verdict == "over"
    lower = fall_back(tight)
    assert lower.verdict != "over"
    assert lower.spec is tight.spec
    assert lower.context == 2048
    assert "shortened" in lower.reason


def test_remedies_change_one_thing_each(made_up):
    tight = replace(chosen(made_up(vram_gb=6), LLAMA7B, context=4096), reason="")
    found = remedies(tight)
    assert found
    for lower in found:
        assert lower.verdict != "over"
        assert lower.reason.count(".") <= 2


def test_no_rung_offers_a_model_that_is_no_smaller(made_up):
    smallest = chosen(made_up(ram_gb=16), DEMO)
    assert FALLBACKS[-1](smallest) is None
