"""Sweeps: grids from YAML, cells side by side inside the budget, a table that survives a kill, Stop, the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import toys

from lowmem.__main__ import main
from lowmem.datasets.texts import evaluation_text
from lowmem.errors import BadInput, Cancelled, OutOfMemory, Unsupported
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.hardware import probe
from lowmem.machine.isolated import Finished
from lowmem.measure import compare as compare_module
from lowmem.measure.estimate import peaks, quantized
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row
from lowmem.measure.variants import parse_variant
from lowmem.models.source import read_spec
from lowmem.planning.model_bytes import weight_bytes
from lowmem.quant import METHODS, get
from lowmem.quant.pipeline import quantize_folder
from lowmem.settings import settings
from lowmem.sweep.grid import MAX_CELLS, Grid, make_grid, read_grid
from lowmem.sweep.local import LocalPool, Task
from lowmem.sweep.run import sweep
from lowmem.sweep.table import opened
from lowmem.units import GB, MB

MEASURE = {"tokens": 200, "window": 64, "stride": 32, "prompt_tokens": 32, "new_tokens": 4, "runs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_toy("llama", tmp_path_factory.mktemp("sweep")))


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.cli.compare.measure_runtime_bytes", lambda: 0)


def grid_of(folder: str, **changes: object) -> Grid:
    content = {"models": [folder], "precisions": ["fp32", "int8"], "measure": MEASURE} | changes
    return make_grid({key: value for key, value in content.items() if value is not None})


# grids


def test_a_grid_is_models_times_precisions_and_methods_times_settings(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "models: [demo, a/b]\nprecisions: [int8]\nram: 4G\ntext: wikitext2\nmeasure: {tokens: 512}\n"
        "methods:\n  rtn: {bits: [3, 4], group_size: [32, 64]}\n  gptq: {symmetric: [false, true], samples: 16}\n  hqq:\n"
    )
    grid = read_grid(path)
    names = ["fp32", "int8", "rtn:3:32", "rtn:3:64", "rtn:4:32", "rtn:4:64"]
    names += ["gptq:4:64:samples=16", "gptq:4:64:symmetric=true:samples=16", "hqq:4:64"]
    assert [cell.name for cell in grid.cells()] == [f"{model} {name}" for model in ("demo", "a/b") for name in names]
    assert [cell.variant.name for cell in grid.cells() if cell.is_reference] == ["fp32", "fp32"]
    assert (grid.budget, grid.text, grid.options.tokens) == (MemoryBudget(4 * GB), "wikitext2", 512)
    sym = parse_variant("gptq:4:64:symmetric=true:samples=16")
    assert sym in grid.variants
    assert (sym.options, sym.calibration) == ({"bits": 4, "group_size": 64, "symmetric": True}, {"samples": 16})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("[1, 2]", "empty"),
        ("models: [demo\nprecisions: x", "not valid YAML, see line"),
        ("models: [demo]", "neither precisions nor methods"),
        ("precisions: [fp32]", "no model"),
        ("models: [demo]\nmethod: [rtn]", "no key 'method'"),
        ("models: [demo]\nmethods: [rnt]", "method 'rnt'"),
        ("models: [demo]\nmethods: {rtn: {bits: [3, 5]}}", "in 5 bits"),
        ("models: [demo]\nmethods: {awq: {bits: [3, 4]}}", "stores 4 bits, not 3"),
        ("models: [demo]\nmethods: {rtn: {colour: red}}", "'colour'"),
        ("models: [demo]\nmethods: {rtn: 4}", "rtn in the grid"),
        ("models: [demo]\nprecisions: [fp31]", "'fp31'"),
        ("models: [demo]\nprecisions: ['gptq:4:64']", "not a precision"),
        ("models: [1]\nprecisions: [fp32]", "models in the grid"),
        ("models: [demo]\nprecisions: [fp32]\nmeasure: {tokens: 1}", "Tokens of text is 1"),
        ("models: [demo]\nprecisions: [fp32]\nram: much", "not a size"),
        (f"models: [demo]\nmethods: {{rtn: {{group_size: {list(range(16, 1100))}}}}}", f"more than {MAX_CELLS}"),
        ("models: &a [demo]\nprecisions: *a", "'demo'"),
        ("models: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_what_is_no_grid_ends_with_3_and_one_sentence(tmp_path, capsys, monkeypatch, text, words):
    monkeypatch.setattr(compare_module, "run_isolated", None)
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    assert main(["compare", "--grid", str(path)]) == 3
    said = capsys.readouterr().err
    assert words in said
    assert len(said.splitlines()) <= 2


def test_files_and_flags_that_do_not_go_together(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("models: [demo]\nprecisions: [fp32]")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for arguments, words in (
        (["--grid", str(tmp_path / "absent.yaml")], "cannot be read"),
        (["--grid", str(tmp_path / "bytes")], "cannot be read"),
        (["--grid", str(tmp_path)], "cannot be read"),
        (["demo", "--grid", str(tmp_path / "grid.yaml")], "one too many"),
        ([], "No model"),
    ):
        assert main(["compare", *arguments]) == 3
        assert words in capsys.readouterr().err


# side by side

FIGURES = {
    "device": "cpu", "tokens": 9, "window": 8, "stride": 4, "weight_bytes": 1000, "disk_bytes": 2000, "perplexity": 10.0, "kl": 0.0,
    "agreement": 1.0, "prefill_tps": 50.0, "decode_tps": 5.0, "predicted_ram_bytes": 90, "predicted_vram_bytes": None,
}  # fmt: skip


@pytest.fixture
def jobs(monkeypatch):
    """Jobs of a moment: `fail` maps a precision or method to what it raises once, `calls` has (name, arguments, limits)."""
    jobs = ModuleType("jobs")
    jobs.calls, jobs.fail, jobs.running, jobs.most, jobs.held, jobs.seconds = [], {}, [], 0, 0, 0.05
    lock = threading.Lock()

    def run(function, arguments, cancel, limits):
        name = arguments.get("method") or arguments["precision"]
        with lock:
            jobs.calls.append((name, arguments, limits))
            jobs.running.append(limits.ram)
            jobs.most, jobs.held = max(jobs.most, len(jobs.running)), max(jobs.held, sum(jobs.running))
        try:
            yield Step(50, 100, "Half", "%")
            cancel.wait(jobs.seconds)
            if name in jobs.fail:
                raise jobs.fail.pop(name)
            if arguments.get("is_reference"):
                Path(arguments["reference"]).write_bytes(b"predictions")
            if "out" in arguments:
                yield Finished({"details": {"bits_per_quantized_weight": 4.5}}, 2.0, {"ram": 77})
            else:
                yield Finished({**FIGURES, "perplexity": 10.0 + len(jobs.calls)}, 1.0, {"ram": 100})
        finally:
            with lock:
                jobs.running.remove(limits.ram)

    monkeypatch.setattr(compare_module, "run_isolated", run)
    return jobs


METHODS_4 = {"rtn": {"bits": [3, 4, 8], "group_size": 32}, "hqq": {"bits": [3, 4, 8], "group_size": 32}}


def rows_of(events: object) -> list[Row]:
    return [event for event in events if isinstance(event, Row)]


def test_cells_run_side_by_side_and_never_hold_more_than_the_budget(folder, jobs, monkeypatch):
    monkeypatch.setattr("lowmem.sweep.run.probe", lambda: replace(probe(), cores=8))
    grid = grid_of(folder, methods=METHODS_4, ram="4G")
    events = list(sweep(grid, workers=8))
    rows, receipt = rows_of(events), events[-1]
    assert len(rows) == 8
    assert rows[0].variant == "fp32"
    assert all(row.model == folder for row in rows)
    assert jobs.most > 1
    assert 0 < jobs.held <= 4 * GB
    assert isinstance(receipt, Receipt)
    assert [row["variant"] for row in receipt.details["rows"]] == [cell.variant.name for cell in grid.cells()]
    assert rows[1].perplexity_change == pytest.approx(rows[1].perplexity / rows[0].perplexity - 1)
    assert any("ran in parallel with 1 cores each" in note for note in receipt.notes)
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[-1].done <= steps[-1].total == 800
    references = [arguments for _, arguments, _ in jobs.calls if arguments.get("is_reference")]
    assert len(references) == 1


def test_one_worker_runs_one_cell_at_a_time_with_all_cores(folder, jobs):
    *_, receipt = sweep(grid_of(folder, methods={"rtn": {"bits": [4, 8], "group_size": 32}}), workers=1)
    assert jobs.most == 1
    assert {arguments["threads"] for _, arguments, _ in jobs.calls} == {probe().cores}
    assert not any("in parallel" in note for note in receipt.notes)


def test_a_cell_that_passes_its_allotment_is_run_again_with_the_whole_budget(folder, jobs):
    jobs.fail = {"int8": OutOfMemory("The budget was reached.", "")}
    rows = rows_of(sweep(grid_of(folder, ram="4G")))
    assert [row.error for row in rows] == ["", ""]
    limits = [limits.ram for name, _, limits in jobs.calls if name == "int8"]
    assert limits[0] < limits[1]


def test_a_cell_that_cannot_be_done_is_a_row_and_the_others_go_on(folder, jobs):
    jobs.fail = {"int8": Unsupported("Not here.", "Go."), "rtn": ZeroDivisionError("a bug")}
    with pytest.raises(ZeroDivisionError):
        list(sweep(grid_of(folder, methods={"rtn": {"group_size": 32}})))
    jobs.fail = {"int8": Unsupported("Not here.", "Go."), "rtn": RuntimeError("Trace\nboom")}
    rows = {row.variant: row for row in rows_of(sweep(grid_of(folder, methods={"rtn": {"group_size": 32}})))}
    assert rows["rtn:4:32"].error == "Unexpected error: boom"
    assert len(rows) == 3


def test_a_failed_reference_lets_the_others_go(folder, jobs):
    jobs.fail = {"fp32": Unsupported("Too large.", "")}
    rows = rows_of(sweep(grid_of(folder)))
    assert [(row.variant, row.perplexity_change) for row in rows] == [("fp32", None), ("int8", None)]


# the table on disk


def test_the_table_is_whole_after_every_row_and_a_second_run_measures_nothing(folder, jobs, tmp_path):
    out, grid = tmp_path / "out", grid_of(folder, methods={"rtn": {"bits": [4, 8], "group_size": 32}})
    count = 0
    for row in sweep(grid, out):
        if isinstance(row, Row):
            count += 1
            assert len((out / "results.csv").read_text().splitlines()) == 1 + count
    assert count == 4
    written = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert {line["variant"] for line in written} == {"fp32", "int8", "rtn:4:32", "rtn:8:32"}
    assert not (out / "work").exists()
    jobs.calls.clear()
    again = list(sweep(grid, out))
    assert jobs.calls == []
    assert len(rows_of(again)) == 4
    assert len(again[-1].details["rows"]) == 4


def test_stop_keeps_what_is_done_and_the_next_run_goes_on(folder, jobs, tmp_path):
    out, grid = tmp_path / "out", grid_of(folder, methods=METHODS_4)
    cancel = CancelToken()
    events = sweep(grid, out, workers=1, cancel=cancel)
    for _ in range(3):
        next(event for event in events if isinstance(event, Row))
    cancel.set()
    with pytest.raises(Cancelled):
        list(events)
    kept = json.loads((out / "results.json").read_text())["rows"]
    assert len(kept) == 3
    before = len(jobs.calls)
    rows = rows_of(sweep(grid, out, workers=1))
    assert len(rows) == 8
    made = [arguments for _, arguments, _ in jobs.calls[before:] if "out" in arguments]
    assert len(made) == 8 - 3
    assert not any(arguments.get("is_reference") for _, arguments, _ in jobs.calls[before:])


def test_failed_rows_are_tried_again_with_their_reference(folder, jobs, tmp_path):
    jobs.fail = {"int8": Unsupported("Not now.", "")}
    assert rows_of(sweep(grid_of(folder), tmp_path / "out"))[1].error
    rows = rows_of(sweep(grid_of(folder), tmp_path / "out"))
    assert [(row.variant, row.error) for row in rows] == [("fp32", ""), ("int8", "")]
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 2


def test_a_grid_that_grew_keeps_its_rows_and_other_conditions_are_refused(folder, jobs, tmp_path):
    out = tmp_path / "out"
    list(sweep(grid_of(folder), out))
    jobs.calls.clear()
    rows = rows_of(sweep(grid_of(folder, methods={"rtn": {"group_size": 32}}), out))
    assert len(rows) == 3
    assert [name for name, _, _ in jobs.calls] == ["fp32", "rtn", "stored"]
    with pytest.raises(BadInput, match="under other conditions"):
        list(sweep(grid_of(folder, measure=MEASURE | {"tokens": 100}), out))
    (out / "results.json").write_text("{")
    with pytest.raises(BadInput, match="not the table of a sweep"):
        list(sweep(grid_of(folder), out))


def test_a_folder_takes_one_sweep_at_a_time(folder, jobs, tmp_path):
    first = sweep(grid_of(folder), tmp_path / "out")
    next(first)
    with pytest.raises(BadInput, match="Another sweep is running"):
        next(sweep(grid_of(folder), tmp_path / "out"))
    first.close()
    assert len(rows_of(sweep(grid_of(folder), tmp_path / "out"))) == 2


def test_the_text_is_written_once_since_running_cells_read_it(folder, tmp_path):
    grid, text = grid_of(folder), evaluation_text()
    with opened(tmp_path / "out", grid, text) as table:
        first = (table.work(folder) / "text.txt").stat()
        assert table.work(folder) == table.work(folder)
        assert (table.work(folder) / "text.txt").stat().st_mtime_ns == first.st_mtime_ns
        assert (table.work(folder) / "text.txt").read_text(encoding="utf-8") == text.text


def test_the_default_folder_is_the_same_for_the_same_grid(folder, jobs):
    first, second = (list(sweep(grid_of(folder)))[-1] for _ in range(2))
    other = list(sweep(grid_of(folder, methods={"rtn": {"group_size": 32}})))[-1]
    assert first.details["folder"] == second.details["folder"] != other.details["folder"]
    assert Path(first.details["folder"]).parent == settings().outputs


# real processes


def test_the_toy_swept_on_the_command_line(folder, tmp_path, capsys):
    path, table, image = tmp_path / "grid.yaml", tmp_path / "table.csv", tmp_path / "picture.svg"
    path.write_text(
        f"models: [{folder}]\nprecisions: [int8]\nmeasure: {json.dumps(MEASURE)}\n"
        "methods:\n  rtn: {bits: [4, 8], group_size: 32}\n  hqq: {symmetric: [true], group_size: 32}\n"
    )
    files = ["--out", str(tmp_path / "out"), "--csv", str(table), "--png", str(image)]
    assert main(["compare", "--grid", str(path), "--json", *files]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    rows = {row["variant"]: row for row in json.loads(line)["details"]["rows"]}
    assert list(rows) == ["fp32", "int8", "rtn:4:32", "rtn:8:32", "hqq:4:32:symmetric=true"]
    assert [row["error"] for row in rows.values()] == [""] * 5
    assert rows["fp32"]["kl"] == 0
    assert 0 < rows["rtn:8:32"]["kl"] < rows["rtn:4:32"]["kl"]
    for row in rows.values():
        assert 100 * MB < row["ram_bytes"] < 2 * GB
    assert len(table.read_text().splitlines()) == 6
    assert image.read_text().count('class="point"') == 5
    assert main(["compare", "--grid", str(path), *files[:2]]) == 0  # nothing is left to measure
    assert "hqq:4:32:symmetric=true" in capsys.readouterr().out


def test_a_killed_sweep_goes_on_where_it_was(folder, tmp_path):
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(
        f"models: [{folder}]\nprecisions: [int8, bf16]\nmeasure: {json.dumps(MEASURE)}\nmethods: {{rtn: {{group_size: 32}}}}\n"
    )
    command = [sys.executable, "-m", "lowmem", "compare", "--grid", str(path), "--out", str(out), "--workers", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = iter(child.stdout.readline, "")
    assert next(line for line in lines if "fp32" in line)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = [row["variant"] for row in json.loads((out / "results.json").read_text())["rows"]]
    assert kept[0] == "fp32"
    assert len(kept) < 4
    measured = []
    for event in sweep(read_grid(path), out):
        if isinstance(event, Step):
            measured.append(event.note)
    assert not any("fp32:" in note for note in measured)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert sorted(row["variant"] for row in rows) == ["bf16", "fp32", "int8", "rtn:4:32"]
    assert all(row["kl"] is not None for row in rows)
    assert all(row["ram_bytes"] < 1.06 * row["predicted_ram_bytes"] for row in rows)  # a model of no size


def test_stop_ends_real_processes_within_a_second(folder):
    cancel, pressed = CancelToken(), []
    events = sweep(grid_of(folder), cancel=cancel)
    assert isinstance(next(events), Step)
    threading.Timer(0.3, lambda: (pressed.append(time.monotonic()), cancel.set())).start()
    with pytest.raises(Cancelled):
        list(events)
    assert time.monotonic() - pressed[0] < 1.0


# forecasts


@pytest.mark.parametrize(
    "name", ["rtn:4:32", "rtn:3:32:symmetric=true", "awq:4:32:samples=2:length=64", "int8_dynamic:8:-1"]
)
def test_the_forecast_knows_the_checkpoint_that_will_be_made(folder, tmp_path, name):
    variant = parse_variant(name)
    request = variant.request(folder, tmp_path / "out")
    expected = quantized(read_spec(folder), request)
    list(quantize_folder(Path(folder), request))
    made = read_spec(str(tmp_path / "out"))
    assert expected.stored == made.stored
    assert expected.packed_layers == made.packed_layers
    assert expected.parameters == made.parameters
    assert weight_bytes(expected, "stored", "fp32") == weight_bytes(made, "stored", "fp32")


def test_peaks_of_every_method_are_known_beforehand(folder):
    hardware, limits = probe(), MemoryBudget(4 * GB)
    usual = {"int8_dynamic": "int8_dynamic:8:-1", "bnb": "bnb:4:64"}
    for method in METHODS:
        found = peaks(
            read_spec(folder), parse_variant(usual.get(method, f"{method}:4:32")), MeasureOptions(), hardware, limits
        )
        if get(method).available(hardware) is None:
            assert found is not None, method
            assert found["ram"] > hardware.runtime_bytes


def test_a_pool_gives_a_cell_without_a_forecast_the_whole_budget(folder):
    pool = LocalPool(MemoryBudget(2 * GB), 4, 1, CancelToken())
    cell = grid_of(folder).cells()[0]
    task = Task(cell, read_spec(folder), Path(folder), MeasureOptions(), None)
    assert pool._allotment(task) == MemoryBudget(2 * GB)
    assert pool._allotment(replace(task, peaks={"ram": 800 * MB})) == MemoryBudget(900 * MB)
