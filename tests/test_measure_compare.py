"""Comparisons: variants, rows as they finish, failures that stay their own, Stop, table and picture."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import toys
from matplotlib.axis import Tick
from matplotlib.text import Text
from PIL import Image

from lowmem.__main__ import main
from lowmem.errors import BadInput, Cancelled, OutOfMemory
from lowmem.events import CancelToken, Receipt, Step
from lowmem.jobs import find
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.isolated import Finished
from lowmem.measure import compare as compare_module
from lowmem.measure.compare import compare
from lowmem.measure.options import MeasureOptions
from lowmem.measure.progress import share
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.measure.variants import Variant, parse_variant, parse_variants
from lowmem.plots import variants as plots
from lowmem.plots.figure import COLORS, to_png, to_svg
from lowmem.plots.variants import picture
from lowmem.settings import settings
from lowmem.units import MB

QUICK = MeasureOptions(tokens=200, window=64, stride=32, prompt_tokens=32, new_tokens=4, runs=1)
QUICK_FLAGS = [
    "--tokens",
    "200",
    "--window",
    "64",
    "--stride",
    "32",
    "--prompt-tokens",
    "32",
    "--new-tokens",
    "4",
    "--runs",
    "1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(toys.save_toy("llama", tmp_path_factory.mktemp("compare")))


@pytest.fixture(autouse=True)
def _no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's own memory is measured by a child of several seconds; the default will do here."""
    monkeypatch.setattr("lowmem.cli.compare.measure_runtime_bytes", lambda: 0)


@pytest.mark.parametrize(
    ("text", "variant"),
    [
        ("fp32", Variant("fp32", precision="fp32")),
        (" INT8 ", Variant("int8", precision="int8")),
        ("int8_dynamic", Variant("int8", precision="int8")),
        ("gptq", Variant("gptq:4:64", method="gptq", bits=4, group=64)),
        ("rtn:8:-1", Variant("rtn:8:-1", method="rtn", bits=8, group=-1)),
        ("hqq:3", Variant("hqq:3:64", method="hqq", bits=3, group=64)),
        ("awq:4:128", Variant("awq:4:128", method="awq", bits=4, group=128)),
        (
            "gptq:4:64:samples=16:symmetric=yes:order=groups",
            Variant("gptq:4:64:symmetric=true:samples=16", "", "gptq", 4, 64, (("symmetric", True), ("samples", 16))),
        ),
        ("rtn:4:samples=8", Variant("rtn:4:64", method="rtn", bits=4, group=64)),
    ],
)
def test_variants_are_read(text, variant):
    assert parse_variant(text) == variant
    assert parse_variant(variant.name) == variant


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fp17",
        "gptq:5:64",
        "gptq:4:0",
        "gptq:4:99999",
        "gptq::64",
        "gptq:four",
        "gptq:4:64:1",
        "fp32:4",
        "rtn:²",
        "gptq:4:64:symmetric=maybe",
        "rtn:4:64:order=none",
        "gptq:samples=0",
        "gptq:text=/etc/passwd",
    ],
)
def test_what_is_no_variant_is_refused_with_those_there_are(text):
    with pytest.raises(BadInput) as caught:
        parse_variants(text)
    assert caught.value.hint


def test_a_list_has_each_variant_once():
    assert [variant.name for variant in parse_variants("fp32, int8,gptq,,gptq:4:64,int8_dynamic")] == [
        "fp32",
        "int8",
        "gptq:4:64",
    ]


def test_the_toy_compared_on_the_command_line(folder, tmp_path, capsys):
    # The text is measured in real processes; fp32 is added as the reference.
    table, image = tmp_path / "table.csv", tmp_path / "picture.png"
    arguments = [
        "compare",
        folder,
        "--variants",
        "int8,fp16,rtn:4:32",
        "--csv",
        str(table),
        "--png",
        str(image),
        "--json",
    ]
    assert main([*arguments, *QUICK_FLAGS]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    receipt = json.loads(line)
    rows = {row["variant"]: row for row in receipt["details"]["rows"]}
    assert list(rows) == ["fp32", "int8", "fp16", "rtn:4:32"]
    check_figures(rows["fp32"], rows["int8"])
    assert rows["rtn:4:32"]["error"] == ""
    assert rows["rtn:4:32"]["kl"] > rows["int8"]["kl"]
    assert 0 < rows["rtn:4:32"]["quantize_seconds"] < rows["rtn:4:32"]["seconds"]
    assert "fp16 is slow and imprecise on CPUs" in rows["fp16"]["error"]
    assert any(note.startswith("fp16: ") for note in receipt["notes"])
    written = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["variant"] for row in written] == list(rows)
    assert float(written[1]["kl"]) == rows["int8"]["kl"]
    assert float(written[0]["prediction_error"])
    assert written[2]["perplexity"] == ""
    assert Image.open(image).size[0] == 2 * plots.WIDTH
    assert not list((settings().home / "work").iterdir())


def check_figures(fp32: dict, int8: dict) -> None:
    assert fp32["kl"] == 0.0
    assert fp32["agreement"] == 1.0
    assert fp32["perplexity_change"] == 0.0
    assert 0 < int8["kl"] < 0.1
    assert 0.7 < int8["agreement"] <= 1.0
    assert int8["perplexity"] == pytest.approx(fp32["perplexity"], rel=0.05)
    assert int8["perplexity_change"] == pytest.approx(int8["perplexity"] / fp32["perplexity"] - 1)
    assert fp32["bits_per_parameter"] == pytest.approx(32.0)
    for row in (fp32, int8):
        assert row["error"] == ""
        assert row["prefill_tps"] > 0
        assert row["decode_tps"] > 0
        assert 100 * MB < row["ram_bytes"] < 2000 * MB
        assert row["predicted_ram_bytes"] > row["weight_bytes"]
        assert row["seconds"] > 0


def test_a_variant_against_itself_shows_no_difference(folder):
    """A second process computes the same: the file between them loses nothing that counts."""
    rows = [e for e in compare(folder, parse_variants("int8"), reference="int8", options=QUICK) if isinstance(e, Row)]
    assert [row.variant for row in rows] == ["int8"]
    text = settings().home / "text.txt"
    text.write_text("Some text of a few words, which is all there is to be measured on. " * 5)
    events = list(compare(folder, parse_variants("bf16"), text, options=QUICK))
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == 200
    assert {step.note.split(":")[0] for step in steps} == {"fp32 (1 of 2)", "bf16 (2 of 2)"}
    assert isinstance(events[-1], Receipt)
    assert events[-1].details["text"] == "text.txt"
    assert 0 < events[-2].kl < 0.01


def test_stop_ends_the_comparison_within_a_second_and_cleans_up(folder):
    cancel, pressed = CancelToken(), []
    events = compare(folder, parse_variants("fp32,int8"), options=QUICK, cancel=cancel)
    assert isinstance(next(events), Step)
    threading.Timer(0.3, lambda: (pressed.append(time.monotonic()), cancel.set())).start()
    with pytest.raises(Cancelled):
        list(events)
    assert time.monotonic() - pressed[0] < 1.0
    assert not list((settings().home / "work").iterdir())


FIGURES = {
    "device": "cpu", "tokens": 9, "window": 8, "stride": 4, "weight_bytes": 1000, "disk_bytes": 2000, "perplexity": 10.0, "kl": 0.0,
    "agreement": 1.0, "prefill_tps": 50.0, "decode_tps": 5.0, "predicted_ram_bytes": 90, "predicted_vram_bytes": None,
}  # fmt: skip


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that end at once: `jobs.fail` maps a precision or method to what it raises; `jobs.calls` are the arguments."""

    def run(function, arguments, cancel, limits):
        jobs.calls.append((function.rpartition(":")[2], arguments))
        name = arguments.get("method") or arguments["precision"]
        yield Step(50, 100, "Half", "%")
        if name in jobs.fail:
            raise jobs.fail[name]
        if "out" in arguments:
            Path(arguments["out"]).mkdir()
            yield Finished({"details": {"bits_per_quantized_weight": 4.5}}, 2.0, {"ram": 77})
        else:
            perplexity = 10.0 if arguments["is_reference"] else 12.0
            yield Finished({**FIGURES, "perplexity": perplexity}, 1.0, {"ram": 100})

    jobs = ModuleType("jobs")
    jobs.calls, jobs.fail = [], {}
    monkeypatch.setattr(compare_module, "run_isolated", run)
    return jobs


def test_a_failing_variant_is_a_row_and_the_others_go_on(folder, jobs):
    jobs.fail = {
        "bf16": OutOfMemory("It was killed.", "Take less."),
        "int8": RuntimeError("Traceback\nZeroDivisionError: oops"),
    }
    events = list(compare(folder, parse_variants("fp32,bf16,int8,nf4"), options=QUICK))
    rows = [event for event in events if isinstance(event, Row)]
    assert [row.error for row in rows] == [
        "",
        "It was killed. Take less.",
        "Unexpected error: ZeroDivisionError: oops",
        "",
    ]
    assert rows[3].perplexity_change == pytest.approx(0.2)
    assert rows[1].perplexity is None
    assert len(events[-1].notes) == 2
    assert events[-1].measured == {"ram": 100}
    assert events[-1].error("ram") == pytest.approx(-0.1)


def test_without_its_reference_a_comparison_has_no_changes(folder, jobs):
    jobs.fail = {"fp32": OutOfMemory("No.", "")}
    rows = [event for event in compare(folder, parse_variants("int8"), options=QUICK) if isinstance(event, Row)]
    assert [row.perplexity_change for row in rows] == [None, None]
    assert rows[1].perplexity == 12.0


def test_a_quantized_variant_is_made_measured_and_removed(folder, jobs):
    (_, row) = [event for event in compare(folder, parse_variants("rtn:3:32"), options=QUICK) if isinstance(event, Row)]
    (_, made), (_, done) = jobs.calls[1:]
    assert (made["method"], made["options"]) == ("rtn", {"bits": 3, "group_size": 32})
    assert (done["ref"], done["precision"], done["is_reference"]) == (made["out"], "stored", False)
    assert not Path(made["out"]).exists()
    assert (row.seconds, row.quantize_seconds, row.quantize_ram_bytes, row.ram_bytes) == (3.0, 2.0, 77, 100)


def test_progress_counts_all_variants(folder, jobs):
    steps = [event for event in compare(folder, parse_variants("fp32,rtn"), options=QUICK) if isinstance(event, Step)]
    assert [(step.done, step.total) for step in steps] == [(50, 200), (125, 200), (175, 200)]


def test_remains_of_a_killed_comparison_are_removed(folder, jobs):
    with compare_module.workspace() as own:
        _, _, host, _ = own.name.split("-", 3)
    names = (f"compare-99999999-{host}-x", "elsewhere", "compare-99999999-otherhost-x")
    gone, other, elsewhere = (settings().home / "work" / name for name in names)
    for left in (gone, other, elsewhere):
        left.mkdir(parents=True)
    list(compare(folder, parse_variants("fp32"), options=QUICK))
    assert not gone.exists()
    assert other.exists()
    assert elsewhere.exists()


def test_calibrated_methods_on_their_own_calibration_text_are_marked(folder, jobs, tmp_path):
    from lowmem.datasets.texts import calibration_text

    (tmp_path / "same.txt").write_text(calibration_text().text[:20_000])
    *_, receipt = compare(folder, parse_variants("awq"), tmp_path / "same.txt", options=QUICK)
    assert "is also in the calibration text" in receipt.notes[0]
    *_, receipt = compare(folder, parse_variants("awq"), options=QUICK)
    assert receipt.notes == ()
    *_, receipt = compare(folder, parse_variants("rtn"), tmp_path / "same.txt", options=QUICK)
    assert receipt.notes == ()


def test_the_quantizing_job_runs_the_request_it_was_sent(folder, monkeypatch, tmp_path):
    calls = []

    def quantize_folder(source, request, cancel):
        options = request.options
        calls.append((source, request.out, request.method.name, options.bits, options.group_size))
        calls.append((request.calibration.text, request.budget.ram))
        yield Step(1, 4, "Block 1 of 4")
        yield Receipt("quantize", "toy", "gptq", "cpu", 1.0)

    pipeline = ModuleType("pipeline")
    pipeline.quantize_folder = quantize_folder
    monkeypatch.setitem(sys.modules, "lowmem.quant.pipeline", pipeline)
    request = parse_variant("gptq:3:32").request(folder, tmp_path / "out", MemoryBudget(10**9))
    steps = find("quantize")(**request.as_dict())
    assert list(share(steps, 0, 100)) == [Step(25, 100, "Block 1 of 4", "%")]
    assert calls == [(Path(folder), tmp_path / "out", "gptq", 3, 32), ("manual", 10**9)]


ROWS = [
    Row(
        "fp32",
        weight_bytes=538 * MB,
        perplexity=8.9,
        decode_tps=13.0,
        prefill_tps=320.0,
        ram_bytes=1100 * MB,
        predicted_ram_bytes=1080 * MB,
    ),
    Row(
        "int8",
        weight_bytes=250 * MB,
        perplexity=9.2,
        decode_tps=30.0,
        prefill_tps=650.0,
        ram_bytes=750 * MB,
        predicted_ram_bytes=740 * MB,
    ),
    Row("awq:4:64", error="It <failed> & ended."),
]


def texts_in(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_names_every_variant_and_figure():
    svg = to_svg(picture(ROWS, "Model <1>", "manual (tail)"))
    words = texts_in(svg)
    assert words.count("fp32") == words.count("int8") == 3
    assert words.count("awq:4:64") == 2
    assert words.count("no figures") == 2
    assert {"Model <1>", "30.0 (650)", "1.10 GB", "perplexity on manual (tail); smaller is better"} <= set(words)
    quality, speed, memory = picture(ROWS).axes
    assert (len(speed.patches), len(memory.patches)) == (2, 2)
    assert len(quality.get_lines()) == svg.count('class="point"') == 2


def test_the_picture_stays_on_its_sheet_whatever_the_figures():
    wild = [
        replace(ROWS[0], perplexity=1e9),
        replace(ROWS[1], perplexity=math.inf),
        replace(ROWS[1], variant="rtn:2:64", decode_tps=1e-9),
        *(replace(ROWS[1], variant=f"gptq:{bits}:4096") for bits in range(12)),
    ]
    for rows in (wild, [], ROWS[2:], ROWS[:1]):
        figure = picture(rows)
        figure.draw_without_rendering()
        width, height = figure.bbox.size
        ticks = {id(label) for label in figure.axes[0].findobj(Tick) for label in label.findobj(Text)}
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible() and id(text) not in ticks:  # ticks beyond the axis are not drawn
                box = text.get_window_extent()
                assert box.x0 >= -2, text
                assert box.x1 <= width + 2, text
                assert box.y0 >= -2, text
                assert box.y1 <= height + 2, text


def test_the_bars_are_as_long_as_their_figures():
    widths = [bar.get_width() for axes in picture(ROWS).axes for bar in axes.patches]
    assert widths[0] / widths[1] == pytest.approx(13 / 30, rel=0.01)
    assert widths[2] / widths[3] == pytest.approx(1100 / 750, rel=0.01)


def test_png_and_svg_show_the_same_picture():
    figure = picture(ROWS, "Model")
    image = Image.open(io.BytesIO(to_png(figure))).convert("RGBA")
    view = ElementTree.fromstring(to_svg(figure)).attrib["viewBox"].split()
    assert image.size == (2 * float(view[2]), 2 * float(view[3]))
    assert image.getpixel((0, 0))[3] == 0
    shown = {color for _, color in image.getcolors(1 << 24)}
    for color in COLORS[:2]:
        assert (*bytes.fromhex(color[1:]), 255) in shown


def test_a_table_is_there_whole_or_not_at_all(tmp_path):
    path = write_atomically(tmp_path / "table.csv", to_csv(ROWS))
    assert path.read_text().count("\n") == 4
    with pytest.raises(BadInput, match="cannot be written"):
        write_atomically(tmp_path / "absent" / "table.csv", "x")
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "fp33"], "'fp33'"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--csv", "no/such/folder/table.csv"], "no folder"),
        (["--tokens", "3"], "Tokens of text is 3"),
        (["--reference", "x"], "'x'"),
    ],
)
def test_senseless_wishes_end_with_3_before_anything_starts(folder, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(compare_module, "run_isolated", None)
    assert main(["compare", folder, *arguments]) == 3
    assert words in capsys.readouterr().err


def test_a_budget_that_is_not_a_size_is_wrong_usage(folder, capsys, monkeypatch):
    monkeypatch.setattr(compare_module, "run_isolated", None)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", folder, "--ram", "lots"])
    assert "not a size" in capsys.readouterr().err


@pytest.mark.real
def test_int8_of_the_demo_model_is_nearly_its_original(tmp_path):
    measure_runtime_bytes()
    text = tmp_path / "short.txt"
    text.write_text(
        "The lighthouse keeper wrote in his diary every night, and nobody ever read what he had written there. " * 6
    )
    options = MeasureOptions(tokens=96, window=64, stride=32, prompt_tokens=32, new_tokens=4, runs=1)
    rows = [
        event for event in compare("demo", parse_variants("fp32,int8"), text, options=options) if isinstance(event, Row)
    ]
    fp32, int8 = rows
    assert (fp32.error, int8.error) == ("", "")
    assert 1 < fp32.perplexity < 20
    assert 0 < int8.kl < 0.3
    assert int8.agreement > 0.8
    assert int8.weight_bytes < 0.5 * fp32.weight_bytes
    assert int8.ram_bytes < fp32.ram_bytes - 150 * MB
    for row in rows:
        assert row.prediction_error == pytest.approx(0, abs=0.15)
