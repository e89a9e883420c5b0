"""Long texts from people, curves and tables, the command line, and the exercise on a toy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import save_toy

from lowmem.__main__ import main
from lowmem.datasets.long_text import MAX_CHARACTERS, long_text
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.longctx.curve import Curve
from lowmem.longctx.options import StrategyOptions
from lowmem.longctx.strategies import Point, compare_strategies, strategies
from lowmem.measure.scoring import Segment
from lowmem.plots.figure import to_svg
from lowmem.plots.longctx import perplexity_sheet, picture, to_csv


def test_the_first_source_that_is_given_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "story.txt"
    file.write_text("a story", encoding="utf-8")
    assert long_text("pasted", str(file), "manual").text == "a story"
    assert long_text("pasted", None, "manual").name == "manual (tail)"
    assert long_text("pasted").text == "pasted"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text is empty."),
        (" \n", "The text is empty."),
        ("a\0b", "The text contains binary data."),
        ("x" * (MAX_CHARACTERS + 1), r"2,000,001 characters, more than the 2,000,000 allowed"),
    ],
)
def test_what_is_no_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        long_text(text)


def test_binary_and_huge_files_are_refused_with_the_bound(tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe\x00", "not UTF-8"), (b"a\0b", "binary"), (b"a" * 17_000_000, "16.0 MB")):
        (tmp_path / "file.txt").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            long_text(file=tmp_path / "file.txt")


def test_a_curve_is_the_mean_surprise_of_each_stretch() -> None:
    curve = Curve(100, 4)
    surprise = torch.arange(100) / 100
    for part in surprise.split([30, 1, 69]):
        log_probs = torch.full((len(part), 3), -9.0)
        log_probs[:, 1] = -part
        curve.add(Segment(log_probs, torch.ones(len(part), dtype=torch.long)))
    spans = curve.spans()
    assert [(span.start, span.end) for span in spans] == [(0, 25), (25, 50), (50, 75), (75, 100)]
    for span in spans:
        assert span.perplexity == pytest.approx(math.exp(float(surprise[span.start : span.end].mean())))


def test_plots_and_tables_hold_every_point() -> None:
    points = [Point("a", 10 * n, 5.0 + n, 0.01, 100 * n, 1000) for n in range(1, 5)] + [Point("b", error="too large")]
    figure = picture(points, "model")
    assert [len(line.get_xdata()) for axes in figure.axes for line in axes.get_lines()] == [4, 0, 4, 0, 4, 0]
    assert "model" in to_svg(figure)
    assert len(to_csv(points).splitlines()) == 6
    assert to_svg(perplexity_sheet([(1, math.inf)])).count("no figures") == 1


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("llama", tmp_path_factory.mktemp("toy"))


def receipt_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    "flags", [["--stride", "16"], ["--sinks", "4"], ["--kv-bits", "4"], ["--sinks", "4", "--kv-bits", "2"]]
)
def test_perplexity_on_the_command_line(flags: list[str], toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "longctx",
        "perplexity",
        str(toy_folder),
        "--window",
        "64",
        "--tokens",
        "700",
        "--precision",
        "fp32",
        "--json",
    ]
    assert main([*arguments, *flags]) == 0
    details = receipt_of(capsys)["details"]
    assert details["tokens"] in (699, 700)
    assert details["perplexity"] > 1
    assert details["spans"][-1]["end"] == details["tokens"]


def test_hidden_states_and_streams_on_the_command_line(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [str(toy_folder), "--window", "64", "--tokens", "300", "--precision", "fp32", "--json"]
    out = tmp_path / "states.npy"
    assert main(["longctx", "hidden", *common, "--stride", "32", "--out", str(out)]) == 0
    assert receipt_of(capsys)["details"]["shape"] == [300, 64]
    assert out.stat().st_size == 128 + 300 * 64 * 4
    assert main(["longctx", "stream", *common, "--sinks", "4", "--kv-bits", "8", "--max-new-tokens", "700"]) == 0
    receipt = receipt_of(capsys)
    assert (receipt["new_tokens"], receipt["details"]["kv"]) == (700, "int8")
    assert main(["longctx", "recall", *common[:3], "--precision", "fp32", "--json"]) == 0
    assert [one["distance"] for one in receipt_of(capsys)["details"]["recalls"]] == [32, 128]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["hidden", "--window", "64", "--stride", "65", "--out", "x.npy"],
            "A stride of 65 does not work with windows of 64",
        ),
        (["hidden", "--window", "64"], "No file to write to."),
        (["perplexity", "--window", "8", "--sinks", "8"], "8 sinks leave no room in a window of 8 tokens."),
        (["perplexity", "--window", "4096", "--sinks", "4"], "A window of 4,096 tokens with 4 sinks"),
        (["stream", "--text", "nowhere.txt"], "There is no file nowhere.txt."),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], message: str, toy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, *flags = arguments
    assert main(["longctx", kind, str(toy_folder), "--precision", "fp32", *flags]) == 3
    assert message in capsys.readouterr().err


def test_the_exercise_reads_every_way_in_a_process_of_its_own(toy_folder: Path) -> None:
    options = StrategyOptions(tokens=400, window=64, points=2)
    events = list(compare_strategies(str(toy_folder), options=options, precision="fp32"))
    points = [event for event in events if isinstance(event, Point)]
    assert [point.error for point in points] == [""] * 10
    assert [point.strategy for point in points[::2]] == list(strategies(options))
    receipt = events[-1]
    assert isinstance(receipt, Receipt)
    assert len(receipt.details["points"]) == 10
    windowed = [point.kv_bytes for point in points if point.strategy == "window with sinks"]
    assert windowed[0] == windowed[1]


def test_the_exercise_stops(toy_folder: Path) -> None:
    cancel = CancelToken()
    cancel.set()
    with pytest.raises(Exception, match="Stopped"):
        list(compare_strategies(str(toy_folder), options=StrategyOptions(tokens=400, window=64), cancel=cancel))
