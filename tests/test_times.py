"""Estimated times: rates measured once per machine, corrected by what actions took, and nothing lost where that fails."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toys

from lowmem.errors import Cancelled, LowMemError
from lowmem.events import CancelToken, Receipt, Step, drain, until_receipt
from lowmem.export import probes as export_probes
from lowmem.generate.options import GenerateOptions
from lowmem.machine import bandwidth, rates, timing
from lowmem.machine.direct_io import Shard
from lowmem.models.catalog import synthetic
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.offload.run import BlockPlacement, plan_for
from lowmem.offload.run import run as run_offloaded
from lowmem.planning.exported import writing_seconds
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.quant import probes, run, seconds
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.seconds import quantize_seconds
from lowmem.runtime.session import Session
from lowmem.units import format_time_range

# --- rates


def test_a_rate_is_measured_once_per_processor_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(rates.Unmeasured):
        rates.saved_rate("work", None, lambda: 3.0)
    assert rates.saved_rate("work", False, lambda: 3.0) == 3.0
    assert rates.saved_rate("work", False, lambda: 4.0) == 3.0
    assert rates.saved_rate("work", True, lambda: 5.0) == rates.known_rate("work") == 5.0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(rates.Unmeasured):
        rates.known_rate("work")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(rates.processor, "name", lambda: "another processor")
    with pytest.raises(rates.Unmeasured):
        rates.known_rate("work")


def test_one_bad_run_does_not_distort_the_next_estimate() -> None:
    rates.learn("action", predicted=100, seconds=900)
    assert rates.correction("action") == 1.0
    for taken in (118, 120, 122):
        rates.learn("action", predicted=100 * rates.correction("action"), seconds=taken)
    assert rates.correction("action") == pytest.approx(1.2, rel=0.05)
    rates.learn("action", predicted=100 * rates.correction("action"), seconds=2000)
    assert rates.correction("action") == pytest.approx(1.2, rel=0.05)


def test_short_runs_correct_nothing() -> None:
    for _ in range(4):
        rates.learn("action", predicted=1, seconds=9)
    assert rates.correction("action") == 1.0


@pytest.mark.parametrize(
    ("predicted", "shown"),
    [(5, "less than 10 s"), (40, "30 to 50 s"), (100, "1 to 3 min"), (600, "8 to 13 min"), (20_000, "4 to 7 h")],
)
def test_a_time_is_shown_as_a_range(predicted: float, shown: str) -> None:
    assert format_time_range(predicted) == shown


# --- quantizing


class Rates:
    """Probes of an imaginary machine."""

    plain_rate = staticmethod(lambda *_: 1e8)
    strip_rate = staticmethod(lambda *_: 1e3)
    factor_rate = staticmethod(lambda *_: 1e10)
    product_rate = staticmethod(lambda *_: 1e11)
    calibration_rate = staticmethod(lambda *_: 1e9)


@pytest.fixture
def imaginary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "_probes", lambda: Rates)


def shape(layers: int = 4, hidden: int = 512) -> ModelSpec:
    return synthetic(layers=layers, hidden=hidden, intermediate=4 * hidden, heads=8, vocab=1000)


@pytest.mark.usefixtures("imaginary")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_time_grows_with_blocks_columns_and_text(method: str) -> None:
    request = QuantizeRequest.validated("demo", method)
    longer = QuantizeRequest.validated("demo", method, calibration={"samples": 640})
    base = quantize_seconds(shape(), request, again=False)
    assert quantize_seconds(shape(layers=8), request, again=False) == pytest.approx(2 * base)
    assert quantize_seconds(shape(hidden=1024), request, again=False) > 2 * base
    assert quantize_seconds(shape(), longer, again=False) > base


@pytest.mark.usefixtures("imaginary")
def test_what_a_small_solver_does_per_column_counts() -> None:
    """A model of many small matrices was predicted at 11 s and took minutes: floating-point operations are not its work."""
    small = synthetic(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, vocab=1000)
    request = QuantizeRequest.validated("demo", "gptq")
    assert quantize_seconds(small, request, again=False) > 30 * (3 * 576 + 1536) / 1e3


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_the_probes_run_what_is_predicted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "PROBE_SECONDS", 0.01)
    small = {"layers": 1, "hidden": 64, "intermediate": 128, "heads": 2, "vocab": 256}
    monkeypatch.setattr(probes, "PLAIN_MODEL", small)
    spec = synthetic(**small)
    request = QuantizeRequest.validated("demo", method, {"group_size": 32}, {"samples": 2, "length": 32})
    with pytest.raises(rates.Unmeasured):
        quantize_seconds(spec, request)
    measured = quantize_seconds(spec, request, again=False)
    assert 0 < measured < 60
    assert quantize_seconds(spec, request) == measured


def quantized(folder: Path, out: Path) -> Receipt:
    return drain(
        until_receipt(run.quantize(QuantizeRequest.validated(str(folder), "rtn", {"group_size": 32}, out=out)))
    )


def test_a_receipt_has_the_predicted_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toys.save_toy("llama", tmp_path / "toy")
    assert quantized(folder, tmp_path / "small").predicted_seconds == 0
    monkeypatch.setattr(run, "SMALLEST_TIMED", 0)
    monkeypatch.setattr(seconds, "_probes", lambda: Rates)
    request = QuantizeRequest.validated(str(folder), "rtn", {"group_size": 32})
    predicted = quantize_seconds(read_spec(str(folder)), request, again=False)
    assert quantized(folder, tmp_path / "timed").predicted_seconds == predicted > 0


def test_a_machine_that_cannot_be_measured_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Iterator[Step]:
        raise LowMemError("no child process")
        yield

    folder = toys.save_toy("llama", tmp_path / "toy")
    monkeypatch.setattr(run, "SMALLEST_TIMED", 0)
    monkeypatch.setattr(timing, "run_isolated", broken)
    assert quantized(folder, tmp_path / "out").predicted_seconds == 0


def test_stop_while_measuring_is_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Iterator[Step]:
        raise Cancelled
        yield

    def estimate() -> float:
        raise rates.Unmeasured

    monkeypatch.setattr(timing, "run_isolated", stopped)
    with pytest.raises(Cancelled):
        drain(timing.measured(estimate, "job", {}, CancelToken()))


# --- exporting


def test_the_time_of_an_export_follows_from_exports_of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def exported(_: ModelSpec, _options: ExportOptions, layers: int, vocab: int) -> float:
        return 3.0 + layers * export_probes.BLOCK * 4e-8 + vocab * 512 * 1e-7

    monkeypatch.setattr(export_probes, "_seconds", exported)
    spec = synthetic(layers=16, hidden=2048, intermediate=8192, heads=32, vocab=50_000, tied=True)
    with pytest.raises(rates.Unmeasured):
        writing_seconds(spec, ExportOptions())
    export_probes.measure_export(spec, ExportOptions(), generic=False)
    embeddings = 50_000 * 2048
    wanted = 3 + (spec.parameters - embeddings) * 4e-8 + embeddings * 1e-7
    assert writing_seconds(spec, ExportOptions()) == pytest.approx(wanted, rel=0.01)
    with pytest.raises(rates.Unmeasured):
        writing_seconds(spec, ExportOptions(precision="int4"))


def test_small_models_are_exported_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden": 64, "intermediate": 128, "heads": 2, "tied": True}
    monkeypatch.setattr(export_probes, "SHAPE", small)
    for name, value in {"FEW_BLOCKS": 1, "MANY_BLOCKS": 2, "FEW_WORDS": 256, "MANY_WORDS": 512}.items():
        monkeypatch.setattr(export_probes, name, value)
    spec = synthetic(layers=2, vocab=1000, **small)
    export_probes.measure_export(spec, ExportOptions(), generic=False)
    assert 0 < writing_seconds(spec, ExportOptions()) < 60


# --- disks


def test_a_disk_too_slow_to_measure_is_said_and_the_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SECONDS", 0.05)
    monkeypatch.setattr(bandwidth, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(bandwidth, "Shard", SlowShard)
    session, folder = Session(), toys.save_toy("llama", tmp_path)
    plan = plan_for(session, str(folder), Goal(context=64), placement=BlockPlacement(disk=(0, 1), may_map=False))
    options = GenerateOptions(max_new_tokens=2, greedy=True)
    *_, receipt = run_offloaded(session, plan, ["The"], options, raw=True)
    session.unload()
    assert isinstance(receipt, Receipt)
    assert receipt.new_tokens == 2
    assert any("too slow to measure" in note for note in receipt.notes)
    assert "predicted_seconds_per_token" not in receipt.details


class SlowShard(Shard):
    def read(self, *_: Any) -> None:
        time.sleep(1)
