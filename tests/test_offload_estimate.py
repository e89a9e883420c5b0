"""Predictions of offloaded runs, what they are measured with, and the receipts that compare them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import packed_toys
import pytest
import torch
import toys
from conftest import machine

from lowmem.errors import DiskFull
from lowmem.events import CancelToken, Chunk, Receipt, drain
from lowmem.generate.options import GenerateOptions
from lowmem.machine import bandwidth, rates
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.direct_io import Shard
from lowmem.models.catalog import synthetic
from lowmem.models.quantization import BNB, INT8, Quantization
from lowmem.models.source import read_spec
from lowmem.offload import probes, reference
from lowmem.offload.estimate import estimate_speed, largest_file
from lowmem.offload.plans import place_blocks
from lowmem.offload.run import BlockPlacement, job, measure_speeds, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.placement import Placement
from lowmem.planning.planner import plan
from lowmem.runtime.session import Session
from lowmem.runtime.streaming import blocks
from lowmem.settings import settings

OPTIONS = GenerateOptions(max_new_tokens=6, greedy=True)


@pytest.fixture(autouse=True)
def _quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(probes, "INPUTS", 128)
    monkeypatch.setattr(probes, "OUTPUTS", 256)


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.unload()


def test_what_is_not_known_is_not_measured_unasked(session: Session, tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path)
    made = plan_for(session, str(folder), Goal(context=64), placement=BlockPlacement(disk=(0, 1), may_map=False))
    file = largest_file(folder)
    assert file is not None
    with pytest.raises(rates.Unmeasured):
        estimate_speed(made, file, None)
    list(measure_speeds(str(folder), [0, 1], [], mapped=False))
    speed = estimate_speed(made, file, None)
    assert speed.seconds_per_token > 0
    assert speed.disk_bytes > 0


@pytest.mark.parametrize(
    "stored",
    [
        Quantization("gptq", 4, 32, "gptq"),
        Quantization("gptq", 3, 32, "gptq"),
        Quantization("gptq", 2, 32, "gptq_v2"),
        Quantization("gptq", 8, -1, "gptq"),
        Quantization("gptq", 4, 32, "gptq", desc_act=True),
        Quantization("awq", 4, 32, "gemm"),
        Quantization(INT8, 8, layout="int-quantized"),
        Quantization(BNB, 8, layout="int8"),
        Quantization(BNB, 4, layout="nf4"),
        Quantization(BNB, 4, layout="fp4"),
    ],
    ids=lambda stored: f"{stored.label} {stored.layout}",
)
def test_every_stored_form_can_be_measured(stored: Quantization) -> None:
    if stored.method == BNB:
        pytest.importorskip("bitsandbytes")
    assert probes.streamed_rate(stored) > 0
    assert probes.resident_rate(stored) > 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A file that is large enough to stand for its disk, without any bytes there."""
    file = tmp_path / "weights"
    with file.open("wb") as out:
        out.truncate(bandwidth.CHUNK_BYTES)
    return file


def test_a_prediction_names_what_it_waits_for(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_figures", lambda: figures)
    monkeypatch.setattr(rates, "_key", lambda work: work)
    spec = synthetic(layers=4, hidden=256, intermediate=512, heads=4, dtype="fp32", vocab=1000)
    block = sum(tensor.nbytes for tensor in spec.tensors if ".layers.0." in tensor.name)
    slow_disk = place_blocks(
        plan(spec, machine(), MemoryBudget(10**10), Goal(precision="fp32")), Placement(("disk",) * 4), False
    )
    figures = {"ram 256 inputs": 1e10, "blocks cpu": 1e6, f"disk {disk.stat().st_dev}": 1e6}
    speed = estimate_speed(slow_disk, disk, None)
    assert speed.bound_by == "the disk"
    assert speed.seconds_per_token == pytest.approx(4 * block / 1e6)
    figures = figures | {"blocks cpu": 0.1}
    assert estimate_speed(slow_disk, disk, None).bound_by == "the computation"


def test_a_gpu_waits_for_bus_disk_or_its_own_memory(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        "vram cuda:0": 1e11,
        "bus cuda:0": 1e9,
        "blocks cuda:0": 1e6,
        f"disk {disk.stat().st_dev}": 1e9,
    }
    monkeypatch.setattr(rates, "_figures", lambda: figures)
    monkeypatch.setattr(rates, "_key", lambda work: work)
    spec = synthetic(layers=4, hidden=256, intermediate=512, heads=4, dtype="fp16", vocab=1000)
    base = plan(spec, machine(vram_gb=4), MemoryBudget(10**10, 4 * 10**9), Goal(precision="fp16"))
    for places, bound in ((("gpu",) * 4, "the computation"), (("ram",) * 4, "the bus")):
        assert estimate_speed(place_blocks(base, Placement(places)), disk, None).bound_by == bound
    figures = figures | {f"disk {disk.stat().st_dev}": 1e8}
    mixed = estimate_speed(place_blocks(base, Placement(("gpu", "ram", "disk", "disk"))), disk, None)
    assert mixed.bound_by == "the disk"
    assert mixed.bus_bytes == 3 * mixed.disk_bytes // 2


@pytest.mark.parametrize(
    "where",
    [BlockPlacement(disk=(0,), may_map=False), BlockPlacement(disk=(0, 1)), BlockPlacement(resident=True), None],
)
def test_a_receipt_repeats_its_run(
    where: BlockPlacement | None, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = plan_for(session, str(toys.save_toy("llama", tmp_path)), Goal(context=64), placement=where)
    events = list(run(session, made, ["An old map"], OPTIONS, raw=True))
    receipt = events[-1]
    assert isinstance(receipt, Receipt)
    session.unload()
    made_again: dict[str, object] = {}
    exec(receipt.snippet, made_again)
    assert capsys.readouterr().out == "".join(event.text for event in events if isinstance(event, Chunk))
    again = made_again["plan"]
    assert again.placement == made.placement  # type: ignore[attr-defined]
    made_again["session"].unload()  # type: ignore[attr-defined]


def test_a_quantized_checkpoint_repeats_too(session: Session, tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, packed_toys.Recipe())
    made = plan_for(session, str(tmp_path), Goal(context=64), placement=BlockPlacement(disk=(1,)))
    receipt = list(run(session, made, ["An old map"], OPTIONS, raw=True))[-1]
    assert isinstance(receipt, Receipt)
    exec(receipt.snippet, names := {})
    assert names["plan"].placement == made.placement
    names["session"].unload()


def test_stop_does_not_wait_for_a_slow_disk(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4096)
    made = plan_for(
        session,
        str(toys.save_toy("llama", tmp_path)),
        Goal(context=64),
        placement=BlockPlacement(disk=(0, 1), may_map=False),
    )
    cancel, events = CancelToken(), list(run(session, made, ["An old map"], OPTIONS, raw=True))
    answer = [event.text for event in events if isinstance(event, Chunk)]
    read = Shard.read

    def slowly(self: Shard, *args: object) -> None:
        time.sleep(0.2)
        read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "read", slowly)
    threading.Timer(0.5, cancel.set).start()
    started = time.monotonic()
    # What was read ahead still makes a token; the next one waits.
    stopped = list(session.generate("An old map", OPTIONS, cancel, raw=True))
    assert time.monotonic() - started < 1.5
    assert [event.finish for event in stopped if isinstance(event, Chunk)][-1] == "cancelled"
    monkeypatch.setattr(Shard, "read", read)
    again = session.generate("An old map", OPTIONS, raw=True)
    assert [event.text for event in again if isinstance(event, Chunk)] == answer


def test_the_reference_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toys.save_toy("llama", tmp_path / "toy")
    home = settings().home / "spill"
    (home / "999999999-left").mkdir(parents=True)
    assert drain(job(str(folder), "accelerate", "An old map", 4, {}))["details"]["seconds_per_token"] > 0
    assert list(home.iterdir()) == []
    monkeypatch.setattr(reference, "disk_free_bytes", lambda _: 1000)
    with pytest.raises(DiskFull, match="may write"):
        list(job(str(folder), "accelerate", "An old map", 4, {}))


def test_the_spec_stays_readable_while_it_streams(session: Session, tmp_path: Path) -> None:
    folder = toys.save_toy("gpt2", tmp_path)
    made = plan_for(
        session, read_spec(str(folder)), Goal(context=64), placement=BlockPlacement(disk=(0, 1), may_map=False)
    )
    list(run(session, made, ["An old map"], OPTIONS, raw=True))
    assert session._loaded is not None
    assert session._loaded.model.num_parameters() > 0
    assert all(p.device == torch.device("cpu") for p in session._loaded.model.parameters())
