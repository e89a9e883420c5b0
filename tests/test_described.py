"""Plans for machines that are not here: cards, sizes, speed, what to install, the table, and that nothing is run."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowmem
from lowmem.__main__ import main
from lowmem.errors import BadInput, Unsupported
from lowmem.machine import hardware
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.described import CARDS, DESKTOP_BYTES, DRIVER_BYTES, card, describe_machine, short_name
from lowmem.models.catalog import CATALOG, find
from lowmem.planning.described import BITSANDBYTES, TORCH, expected_speed, plan_described
from lowmem.planning.goal import Goal
from lowmem.planning.precision import available
from lowmem.planning.what_runs import SIZES_GB, Cell, to_csv, what_runs
from lowmem.runtime.remote import WorkerSession
from lowmem.runtime.session import Session
from lowmem.units import GB

DEMO = find("demo").spec()
QWEN7B = find("Qwen/Qwen2.5-7B-Instruct").spec()
LLAMA7B = find("meta-llama/Llama-2-7b-hf").spec()


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return what_runs()


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look at this machine fails."""

    def probed(*_: object) -> None:
        raise AssertionError("this machine was probed")

    monkeypatch.setattr(hardware, "probe", probed)
    for name in ("gpu.gpus", "memory_limits.ram", "memory_limits.process_bytes", "baseline.measure_runtime_bytes"):
        monkeypatch.setattr(f"lowmem.machine.{name}", probed)
    monkeypatch.setattr("lowmem.cli.plan.probe", probed)
    monkeypatch.setattr("lowmem.cli.plan.measure_runtime_bytes", probed)


# --- the description


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("t4", "NVIDIA T4"),
        ("Tesla T4", "NVIDIA T4"),
        ("3060", "NVIDIA GeForce RTX 3060"),
        ("RTX_4060", "NVIDIA GeForce RTX 4060"),
        ("rtx-a2000", "NVIDIA RTX A2000"),
        ("NVIDIA H100", "NVIDIA H100"),
    ],
)
def test_a_card_answers_to_the_names_people_use(name: str, product: str) -> None:
    assert card(name).name == product


@pytest.mark.parametrize("one", CARDS, ids=short_name)
def test_every_card_is_described_by_the_name_that_is_proposed_for_it(one) -> None:
    assert card(short_name(one)) is one
    described = describe_machine(short_name(one))
    assert described.described
    assert described.device.free_bytes < described.device.total_bytes == one.nbytes
    assert ("bf16" in described.device.dtypes) == (one.capability >= (8, 0))


@pytest.mark.parametrize(("name", "near"), [("3061", "rtx-3060"), ("h1000", "h100"), ("a2001", "rtx-a2000")])
def test_an_unknown_card_is_one_sentence_with_the_nearest_names(name: str, near: str) -> None:
    with pytest.raises(BadInput) as caught:
        describe_machine(name)
    assert caught.value.message == f"There is no GPU {name!r} in the table."
    assert near in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "No GPU is described."),
        ({"vram": "500M"}, "A machine with 500 MB of GPU memory has none left: its system takes 600 MB."),
        ({"gpu": "t4", "ram": "1G"}, "A machine with 1.00 GB of RAM has none left: its system takes 2.00 GB."),
        ({"vram": "lots"}, "'lots' is not a size."),
    ],
)
def test_a_machine_that_cannot_be_is_one_sentence(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadInput) as caught:
        describe_machine(**arguments)
    assert caught.value.message == sentence
    assert caught.value.hint


def test_what_driver_and_desktop_take_is_not_free() -> None:
    laptop = describe_machine(vram="6G").device
    assert laptop.free_bytes == 6 * GB - DRIVER_BYTES - DESKTOP_BYTES
    assert describe_machine("t4").device.free_bytes == card("t4").nbytes - DRIVER_BYTES  # it has no screen
    assert MemoryBudget.detect(describe_machine(vram="6G")).vram < laptop.free_bytes


def test_it_is_never_probed_and_imports_no_torch(unprobed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "t4"]) == 0
    assert "NVIDIA T4" in capsys.readouterr().out
    code = "import sys, lowmem\nlowmem.plan_described(None, lowmem.describe_machine('t4'))\n"
    code += "from lowmem.planning.what_runs import what_runs\nwhat_runs()\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- precisions


def test_a_described_t4_refuses_bf16_and_says_why() -> None:
    t4 = describe_machine("t4")
    sentence = "NVIDIA T4 does not support bf16: it needs compute capability 8.0, this GPU has 7.5."
    assert available("bf16", t4) == sentence
    assert available("bf16", describe_machine("3060")) is None
    with pytest.raises(BadInput) as caught:
        plan_described(DEMO, t4, Goal(precision="bf16"))
    assert caught.value.message == sentence


def test_bitsandbytes_follows_compute_capability_and_need_not_be_installed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert available("nf4", describe_machine("t4")) is None
    assert available("nf4", describe_machine("p100")) is None
    assert "compute capability 7.5" in available("bnb8", describe_machine("p100"))
    assert plan_described(LLAMA7B, describe_machine("1080-ti")).plan.precision == "nf4"


# --- the plan


def test_six_gigabytes_run_a_7b_in_4_bits_or_split_it() -> None:
    resident = plan_described(find("mistralai/Mistral-7B-Instruct-v0.3").spec(), describe_machine(vram="6G"))
    assert (resident.plan.precision, resident.plan.placement) == ("nf4", None)
    split = plan_described(QWEN7B, describe_machine(vram="6G"))
    blocks = split.placement.blocks
    assert len(blocks) == QWEN7B.layers
    assert blocks.count("gpu") == 3
    assert blocks.count("ram") == 25
    assert split.plan.verdict != "over"
    assert split.speed.high < resident.speed.low
    assert split.speed.bound_by == "the bus"
    assert any("4-bit" in declined.choice for declined in split.plan.declined)


def test_less_ram_moves_blocks_to_the_disk_and_slows_down() -> None:
    much, little = (plan_described(QWEN7B, describe_machine(vram="6G", ram=ram)) for ram in ("32G", "8G"))
    assert "disk" not in much.placement.blocks
    assert little.placement.blocks.count("disk") > 10
    assert little.speed.high < much.speed.low
    assert little.speed.bound_by == "the disk"


def test_a_quantized_cache_comes_before_offloading() -> None:
    found = plan_described(LLAMA7B, describe_machine(vram="5.8G"))
    assert (found.plan.precision, found.plan.cache_type, found.plan.placement) == ("nf4", "int8", None)
    assert found.plan.reason == "4-bit (bitsandbytes NF4) fits with its KV cache in int8."


def test_what_does_not_fit_even_so_has_no_speed() -> None:
    found = plan_described(QWEN7B, describe_machine(vram="3G", ram="8G"))
    assert found.plan.verdict == "over"
    assert found.speed is None


def test_speed_follows_bandwidth_within_the_range_of_a_measured_t4() -> None:
    """A 0.5B model of 24 blocks on Colab's T4: 24 tokens/s in fp16 and 6 in LLM.int8, by transformers."""
    small = find("Qwen/Qwen2.5-0.5B-Instruct").spec()
    t4 = describe_machine("t4")
    for precision, measured in (("fp16", 24.4), ("bnb8", 6.3)):
        speed = plan_described(small, t4, Goal(precision=precision)).speed
        assert speed.low < measured < speed.high
        assert speed.low < speed.middle < speed.high
    fast = plan_described(LLAMA7B, describe_machine("a100"), Goal(precision="fp16")).speed
    assert fast.high > plan_described(LLAMA7B, describe_machine("a10"), Goal(precision="fp16")).speed.high


def test_batches_share_a_pass() -> None:
    one, four = (plan_described(DEMO, describe_machine("t4"), Goal(batch=batch)) for batch in (1, 4))
    assert four.speed.high > 3 * one.speed.high
    assert expected_speed(one.plan) == one.speed


@pytest.mark.parametrize(("gpu", "wheels"), [("t4", "cu126"), ("h100", "cu126"), ("5090", "cu128")])
def test_the_command_installs_torch_for_the_card(gpu: str, wheels: str) -> None:
    command = plan_described(DEMO, describe_machine(gpu)).install
    assert command == f'pip install "{TORCH}" --index-url https://download.pytorch.org/whl/{wheels} && pip install .'


def test_the_command_has_bitsandbytes_where_the_precision_needs_it_with_the_versions_of_requirements() -> None:
    needed = plan_described(LLAMA7B, describe_machine(vram="8G"))
    assert needed.plan.precision == "nf4"
    assert f'"{BITSANDBYTES}"' in needed.install
    requirements = (Path(lowmem.__file__).parents[1] / "requirements.txt").read_text()
    for one in (TORCH, BITSANDBYTES):
        assert re.search(rf"^{re.escape(one)}\s*(;|$)", requirements, re.MULTILINE)


# --- monotone


def test_more_memory_never_plans_fewer_bits_or_a_smaller_model(cells: list[Cell]) -> None:
    bits = {"nf4": 4, "bnb8": 8, "fp16": 16, "bf16": 16}
    for entry in CATALOG:
        ranks = [
            (cell.speed is not None, not cell.offloaded, bits[cell.precision])
            for cell in cells
            if cell.model == entry.label
        ]
        assert len(ranks) == len(SIZES_GB)
        assert ranks == sorted(ranks), entry.label
    found = [plan_described(None, describe_machine(vram=f"{gb}G")).plan for gb in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24)]
    assert [plan.main.share("weights") for plan in found] == sorted(plan.main.share("weights") for plan in found)


def test_more_memory_never_leaves_fewer_blocks_on_the_gpu() -> None:
    counts = [
        plan_described(QWEN7B, describe_machine(vram=f"{gb}G"), Goal(precision="fp16")).placement.blocks.count("gpu")
        for gb in (6, 8, 10, 12, 14, 16, 18, 20)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == QWEN7B.layers


# --- the table


def test_the_table_has_every_model_at_every_size_and_its_csv_parses(cells: list[Cell]) -> None:
    assert len(cells) == len(CATALOG) * len(SIZES_GB)
    rows = list(csv.DictReader(io.StringIO(to_csv(cells))))
    assert len(rows) == len(cells)
    for row, cell in zip(rows, cells, strict=True):
        assert row["model"] == cell.model
        assert int(row["gpu_blocks"]) + int(row["ram_blocks"]) + int(row["disk_blocks"]) == cell.blocks
        assert (row["fits"] == "True") == (cell.speed is not None) == (float(row["high_tps"]) > 0)
        assert float(row["low_tps"]) <= float(row["high_tps"])


def test_the_table_is_written_as_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, drawn, vector = tmp_path / "t.csv", tmp_path / "t.png", tmp_path / "t.svg"
    assert main(["plan", "--table", "--csv", str(table), "--picture", str(drawn)]) == 0
    printed = capsys.readouterr().out
    assert "24 GB" in printed
    assert "Mistral-7B-Instruct-v0.3" in printed
    assert len(table.read_text().splitlines()) == 1 + len(CATALOG) * len(SIZES_GB)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--picture", str(vector), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(CATALOG) * len(SIZES_GB)
    assert vector.read_text().startswith("<svg")
    assert main(["plan", "demo", "--table", "--device", "cpu", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(SIZES_GB)
    assert main(["plan", "--csv", str(tmp_path / "missing" / "t.csv")]) == 3


# --- the command


def test_vram_without_a_gpu_plans_for_a_described_one(
    monkeypatch: pytest.MonkeyPatch, made_up, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem.cli.plan.probe", lambda: made_up(ram_gb=64))
    assert main(["plan", QWEN7B.ref, "--vram", "6G"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Generic GPU · 6.00 GB VRAM · 16.0 GB RAM · not this machine")
    assert "3 blocks on the GPU, 25 in RAM" in printed
    assert "tok/s, limited by the bus" in printed
    assert "pip install" in printed
    assert "it cannot be run here" in printed


def test_vram_that_a_gpu_here_has_is_its_budget(
    monkeypatch: pytest.MonkeyPatch, made_up, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem.cli.plan.measure_runtime_bytes", lambda: 0)
    monkeypatch.setattr("lowmem.cli.plan.probe", lambda: made_up(vram_gb=24))
    monkeypatch.setattr("lowmem.runtime.session.probe", lambda: made_up(vram_gb=24))
    assert main(["plan", "demo", "--vram", "6G", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["runs_here"]
    assert answer["budgets"]["vram"]["limit"] == 6 * GB
    assert main(["plan", "demo", "--vram", "80G", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["runs_here"]


def test_a_card_can_be_given_a_smaller_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA7B.ref, "--gpu", "t4", "--vram", "8G", "--ram", "32G", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["budgets"]["vram"]["limit"] == 8 * GB
    assert "32.0 GB RAM" in answer["machine"]
    assert answer["blocks"] == {"gpu": 32, "ram": 0, "disk": 0}
    assert answer["tokens_per_second"]["low"] < answer["tokens_per_second"]["high"]
    assert "cannot be run here" in answer["note"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["plan", "--gpu", "voodoo2"], "There is no GPU 'voodoo2' in the table."),
        (["plan", "demo", "--gpu", "t4", "--precision", "bf16"], "NVIDIA T4 does not support bf16"),
        (["plan", "--vram", "200M"], "has none left"),
    ],
)
def test_bad_descriptions_end_with_3(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 3
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 2


# --- nothing is run


def test_this_machine_is_not_taken_for_a_described_one(made_up) -> None:
    with pytest.raises(BadInput) as caught:
        plan_described(DEMO, made_up(vram_gb=8))
    assert caught.value.message == "This machine is not described."


@pytest.mark.parametrize("session", [Session, WorkerSession])
def test_a_session_refuses_to_load_it(session) -> None:
    plan = lowmem.plan_described(DEMO, lowmem.describe_machine("t4")).plan
    with pytest.raises(Unsupported) as caught:
        list(session().load(plan))
    assert caught.value.message == "A plan for another machine (NVIDIA T4): it cannot be run here."
    assert caught.value.hint


def test_gpu_memory_that_is_not_here_is_refused_instead_of_ignored(made_up) -> None:
    with pytest.raises(BadInput) as caught:
        MemoryBudget(vram=6 * GB).bounded(made_up())
    assert caught.value.message == "This machine has no GPU, so 6.00 GB of GPU memory cannot be used."
    assert "lowmem plan --vram" in caught.value.hint
