"""Disks that fill up, that cannot be written, and whose files change while they are read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import fake_hub
import pytest
import toys
from fake_hub import FakeHub
from quantizing import quantize_events

from lowmem.__main__ import main
from lowmem.errors import DiskFailed, DiskFull, LowMemError
from lowmem.events import drain
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.actions import hidden_states
from lowmem.models.fetch import fetch
from lowmem.offload.run import BlockPlacement, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.graph_options import ExportOptions
from lowmem.quant.calibration import Calibration
from lowmem.runtime.session import Session

MOMENTS = int(os.environ.get("LOWMEM_MOMENTS", "2"))
DISK = "48m"
FEW = Calibration(samples=3, length=32)

Action = Callable[[Path, Path], object]
"""Called with the model's folder and one for the result."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save_toy("llama", tmp_path_factory.mktemp("source"))


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    """A model of the test's own."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = sys.platform == "linux" and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def hub(online: None, source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.add("acme/toy", {file.name: file.read_bytes() for file in source.iterdir()})
        yield server


def quantize(model: Path, disk: Path) -> None:
    list(quantize_events(model, disk / "out", "gptq", {"group_size": 32}, FEW, embedding_bits=8))


def export(model: Path, disk: Path) -> None:
    list(export_model(ExportRequest(str(model), disk / "out", ExportOptions(precision="fp32"))))


def write_hidden_states(model: Path, disk: Path) -> None:
    session = Session()
    list(session.load(session.plan_for(str(model), Goal(context=128, precision="fp32", backend="torch"))))
    list(hidden_states(session, "The quick brown fox. " * 60, 32, 8, disk / "out.npy", layers=(0, 1, 2)))


def fetch_model(_model: Path, disk: Path) -> None:
    os.environ["LOWMEM_HOME"] = str(disk)
    drain(fetch("acme/toy"))


WRITING: dict[str, Action] = {
    "quantize": quantize,
    "export": export,
    "hidden states": write_hidden_states,
    "fetch": fetch_model,
}


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.usefixtures("hub")
def test_a_disk_that_is_full_at_a_random_moment(
    name: str, model: Path, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "home"))
    action, drawn = WRITING[name], random.Random(name)
    for _ in range(2):  # the first imports
        started = time.monotonic()
        action(model, disk)
        seconds, wanted = time.monotonic() - started, _results(disk)
        _empty(disk)
    for _ in range(MOMENTS):
        full = threading.Timer(drawn.uniform(0, seconds), _fill, [disk / "filler"])
        full.start()
        with suppress(DiskFull):
            action(model, disk)
        full.join()
        found = _results(disk)
        assert found in ({}, wanted)
        (disk / "filler").unlink()
        if not found:
            action(model, disk)
        assert _results(disk) == wanted
        assert not list(disk.rglob("*.part"))
        _empty(disk)


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _empty(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _results(disk: Path) -> dict[str, bytes]:
    """What can be seen as a result, by name; without the files that tell seconds and bytes."""
    shown = [*disk.glob("out/*"), *disk.glob("out.npy"), *disk.glob("models/acme--toy@*/*")]
    timed = ("README.md", "lowmem_export.json", "source.json")
    return {
        path.name: b"" if path.name in timed else path.read_bytes()
        for path in shown
        if path.is_file() and not path.parent.name.endswith(".part")
    }


# --- places that cannot be written


@pytest.fixture
def read_only(disk: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    return disk


@pytest.mark.usefixtures("hub")
def test_a_home_that_cannot_be_written_is_one_sentence(
    read_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(read_only))
    with pytest.raises(DiskFailed, match=r"toy was not fetched: .*/disk/models: Read-only file system") as caught:
        drain(fetch("acme/toy"))
    assert "LOWMEM_HOME" in caught.value.hint
    assert main(["generate", "acme/toy", "--prompt", "Once"]) == 3
    assert "Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in WRITING if name != "fetch"])
def test_a_folder_that_cannot_be_written_is_one_sentence(name: str, model: Path, read_only: Path) -> None:
    with pytest.raises(LowMemError, match="Read-only file system"):
        WRITING[name](model, read_only)


def test_a_model_runs_with_a_home_that_cannot_be_written(
    model: Path, read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(read_only))
    quantize(model, tmp_path)
    write_hidden_states(model, tmp_path)


# --- files that change while they are read


def offload(model: Path, _disk: Path) -> Iterator[object]:
    session = Session()
    placement = BlockPlacement(disk=(0, 1), may_map=False)
    plan = plan_for(session, str(model), Goal(context=64), placement=placement)
    yield from run(session, plan, ["Once"], GenerateOptions(greedy=True, max_new_tokens=8), raw=True)


def load(model: Path, _disk: Path) -> Iterator[object]:
    session = Session()
    yield from session.load(session.plan_for(str(model), Goal(context=64, precision="fp32", backend="torch")))


READING: dict[str, Callable[[Path, Path], Iterator[object]]] = {
    "quantize": lambda model, disk: quantize_events(model, disk / "out", "gptq", {"group_size": 32}, FEW),
    "export": lambda model, disk: export_model(ExportRequest(str(model), disk / "out", ExportOptions())),
    "offload": offload,
    "load": load,
}


def truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size * 2 // 3)


def replace(weights: Path) -> None:
    other = weights.with_name("other")
    other.write_bytes(bytes(weights.stat().st_size))
    other.replace(weights)


def delete(weights: Path) -> None:
    weights.unlink()


@pytest.mark.parametrize("change", [truncate, replace, delete])
@pytest.mark.parametrize("name", READING)
def test_weights_that_change_in_the_middle(
    name: str, change: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    """One sentence, or nothing where the weights had been read: never a result of two files."""
    weights, drawn = model / "model.safetensors", random.Random(name + change.__name__)
    before, stat = weights.read_bytes(), weights.stat()
    count = sum(1 for _ in READING[name](model, tmp_path / "0"))
    wanted = _results(tmp_path / "0")
    for moment in range(1, 1 + MOMENTS):
        disk = tmp_path / str(moment)
        disk.mkdir()
        stop, ended = drawn.randrange(count), None
        try:
            for number, _ in enumerate(READING[name](model, disk)):
                if number == stop:
                    change(weights)
        except LowMemError as error:
            ended = error
        assert _results(disk) == ({} if ended else wanted), f"changed at event {stop} of {count}"
        weights.write_bytes(before)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if ended is not None:
            list(READING[name](model, disk))
        assert _results(disk) == wanted
