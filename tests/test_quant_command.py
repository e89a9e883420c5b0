"""`python -m lowmem quantize`: what it makes and prints, how it ends, and the same as a job in a child process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toys

from lowmem.__main__ import main
from lowmem.errors import BadInput, Cancelled
from lowmem.events import CancelToken, Receipt
from lowmem.models.source import read_spec
from lowmem.quant.request import QuantizeRequest, output_folder
from lowmem.quant.run import quantize, quantize_isolated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_toy("llama", tmp_path_factory.mktemp("command") / "toy"))


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem.cli.quantize.measure_runtime_bytes", lambda: 0)


def test_json_is_the_receipt_and_nothing_else(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--method", "gptq", "--bits", "3", "--group-size", "32", "--sym", "--samples", "4", "--dampening", "0.2"]
    assert main(["quantize", folder, str(out), *flags, "--sequence-length", "32", "--no-search", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    receipt = json.loads(lines[0])
    assert (receipt["action"], receipt["details"]["bits"], receipt["details"]["group_size"]) == ("quantize", 3, 32)
    assert "dampening=0.2" in receipt["snippet"]
    assert "search=False" in receipt["snippet"]
    stored = read_spec(str(out)).stored
    assert stored is not None
    assert (stored.bits, stored.layout) == (3, "gptq")


def test_earlier_names_of_options_are_answered_with_todays(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [
        "--group-size",
        "32",
        "--samples",
        "4",
        "--sequence-length",
        "32",
        "--damping",
        "0.2",
        "--balance",
        "--json",
    ]
    assert main(["quantize", folder, str(tmp_path / "out"), *flags]) == 0
    snippet = json.loads(capsys.readouterr().out)["snippet"]
    assert "dampening=0.2" in snippet
    assert "scale_channels=True" in snippet
    assert "'damping' is now called 'dampening'" in caplog.text


def test_the_courses_table_is_printed(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", folder, str(tmp_path / "out"), "--method", "int8_dynamic"]) == 0
    streams = capsys.readouterr()
    assert streams.out.split()[:5] == ["bits", "original", "quantized", "relative", "loss"]
    assert "RAM peak: predicted" in streams.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "rtn", "--group-size", "64"], "do not divide the 96 inputs"),
        (["--method", "rtn", "--group-size", "7"], "groups of 7 weights"),
        (["--method", "awq", "--bits", "3", "--group-size", "32"], "4 bits, not 3"),
        (["--method", "rtn", "--group-size", "32", "--dampening", "0.1"], "There is no option 'dampening'"),
        (["--method", "gptq", "--group-size", "32", "--dampening", "nan"], "Dampening is nan"),
        (["--method", "gptq", "--group-size", "32", "--calibration", "/nowhere.txt"], "There is no file /nowhere.txt"),
        (["--method", "gptq", "--group-size", "32", "--samples", "4096"], "need "),
        (["--method", "rtn", "--group-size", "32", "--ram", "101M"], "the budget is 101 MB"),
    ],
)
def test_what_cannot_be_done_ends_with_3_and_one_sentence(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["quantize", folder, str(tmp_path / "out"), *flags]) == 3
    streams = capsys.readouterr()
    assert words in streams.err
    assert "Traceback" not in streams.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "rtn", "--group-size", "32"]
    assert main(["quantize", folder, str(tmp_path / "out"), *flags]) == 0
    assert main(["quantize", folder, str(tmp_path / "out"), *flags]) == 3
    assert "already exists" in capsys.readouterr().err
    assert main(["quantize", folder, str(tmp_path / "no" / "out"), *flags]) == 3
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "twice"), *flags]) == 3
    assert "already quantized" in capsys.readouterr().err


def test_interrupting_says_stopped(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowmem.cli.quantize.quantize", interrupted)
    assert main(["quantize", folder, str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_process_of_its_own_gives_the_same_receipt_and_its_true_peak(folder: str, tmp_path: Path) -> None:
    request = QuantizeRequest.validated(folder, "rtn", {"group_size": 32}, out=tmp_path / "new" / "out")
    *steps, receipt = quantize_isolated(request)
    assert isinstance(receipt, Receipt)
    assert steps
    assert receipt.measured["ram"] > 100_000_000
    assert receipt.disk_bytes == (tmp_path / "new" / "out" / "model.safetensors").stat().st_size
    with pytest.raises(BadInput, match="already exists"):
        list(quantize_isolated(request))


def test_stop_ends_the_process(folder: str, tmp_path: Path) -> None:
    cancel = CancelToken()
    request = QuantizeRequest.validated(folder, "rtn", {"group_size": 32}, out=tmp_path / "out")
    events = quantize_isolated(request, cancel)
    next(events)
    cancel.set()
    with pytest.raises(Cancelled):
        list(events)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "method", "options", "expected"),
    [
        ("Toy 1B", "gptq", {}, "Toy-1B-gptq-4bit-g64"),
        ("../x", "rtn", {"symmetric": True, "group_size": -1}, "x-rtn-4bit-sym"),
        ("...", "bnb", {"bits": 8}, "model-bnb-8bit"),
    ],
)
def test_results_are_named_after_what_they_are(name: str, method: str, options: dict[str, Any], expected: str) -> None:
    assert output_folder(name, QuantizeRequest.validated("demo", method, options)).name == expected


def test_an_unfinished_run_with_other_settings_is_deleted_only_on_request(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = QuantizeRequest.validated(folder, "rtn", {"group_size": 32}, out=tmp_path / "out")
    running = quantize(request)
    next(step for step in running if "Block 2" in getattr(step, "note", ""))
    running.close()
    command = ["quantize", folder, str(tmp_path / "out"), "--method", "rtn", "--bits", "3", "--group-size", "32"]
    assert main(command) != 0
    assert "bits was 4, now 3. Start over" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out.part").is_dir()
    assert main([*command, "--restart"]) == 0
    assert (tmp_path / "out").is_dir()
