"""The Export tab without a browser: what it forecasts, shows and refuses; and its jobs in child processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import toys
from ui_stub import StubEngine

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt
from lowmem.export.request import ExportRequest, estimate
from lowmem.export.run import benchmark, export_isolated, output_folder
from lowmem.models.catalog import find
from lowmem.models.source import read_spec
from lowmem.planning.graph_options import ExportOptions
from lowmem.plots.engines import graph_benchmark
from lowmem.plots.figure import to_svg
from lowmem.settings import settings
from lowmem.ui.html import export as export_render
from lowmem.ui.page import build_ui
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.access import Access
from lowmem.ui.service.results import result_folder
from lowmem.ui.service.services import Services
from lowmem.ui.tabs.export import ExportTab
from lowmem.units import GB, MB

DEMO = find("demo").spec()
PARITY = {
    one: {"max_difference": 0.5, "kl": 0.0123, "agreement": 0.987, "tokens": 480} for one in ("prefill", "decode")
}


def made(folder: str, **details: Any) -> Receipt:
    return Receipt(
        "export", "Toy", "int8", "cpu", 9.0, {"ram": 500 * MB}, {"ram": 480 * MB}, disk_bytes=101 * MB,
        notes=("Verified: <well>.",),
        details={"folder": folder, "predicted_bytes": 100 * MB, "parity": PARITY, "kind": "fused"} | details,
    )  # fmt: skip


def test_the_page_has_the_tab_and_one_of_each_element() -> None:
    page = build_ui(StubEngine())
    ids = [block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)]
    assert {"export-model", "export-start", "export-card", "benchmark-start", "export-push-token"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_an_estimate_says_what_it_will_cost() -> None:
    small, large = (estimate(DEMO, ExportOptions(precision=p), 400 * MB, 2 * GB) for p in ("int4", "fp32"))
    assert small.disk_bytes < large.disk_bytes
    assert small.verdict == "fits"
    assert "Fused graph" in small.sentence()
    assert "AWQ or GPTQ" in small.caution
    assert small.caution in export_render.card(small, 538 * MB)
    assert large.caution == ""
    assert "AWQ" not in estimate(DEMO, ExportOptions(precision="int4", fused=False), 400 * MB, 9 * GB).caution
    assert estimate(DEMO, ExportOptions(), 400 * MB, 500 * MB).verdict == "over"
    generic = estimate(DEMO, ExportOptions(fused=False), 400 * MB, 9 * GB)
    assert "Generic" in generic.sentence()
    optimised = estimate(DEMO, ExportOptions(precision="fp32", fused=False, optimise=True), 400 * MB, 9 * GB)
    assert optimised.ram_bytes > 400 * MB + 5 * optimised.disk_bytes
    card = export_render.card(small, 538 * MB)
    assert "538 MB" in card
    assert "Fits" in card


def test_the_result_shows_the_parity_check_files_and_escapes(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    shown = export_render.receipt(made(str(tmp_path)))
    assert "0.0123" in shown
    assert "98.7%" in shown
    assert "&lt;well&gt;" in shown
    assert f"gradio_api/file={tmp_path}/model.onnx" in shown


def test_the_optimisers_table_and_its_failure() -> None:
    side = {"nodes": 200, "bytes": 3 * MB, "seconds": 0.004, "operators": {}}
    shown = export_render.optimized(
        {"before": side, "after": side | {"nodes": 90}, "fusions": {"Attention": 3}, "kept": True}
    )
    assert "3 Attention" in shown
    assert "200" in shown
    assert "did not help" in export_render.optimized({"before": side, "kept": False, "failed": "x"})
    assert export_render.optimized({}) == ""


def test_a_race_is_drawn_for_every_length() -> None:
    side = {"prefill_tps": [100.0, 200.0], "token_ms": [10.0, None]}
    result = {"prompts": [32, 128], "torch": side, "onnx": side}
    figures = graph_benchmark(result)
    assert sum(len(axes.patches) for figure in figures for axes in figure.axes) == 6  # the missing figures have no bar
    assert "128 tokens" in to_svg(figures[1])
    assert "200" in export_render.benchmark_table(result)


def test_only_results_of_the_page_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Only results"):
        result_folder(Access(), str(tmp_path))


def test_pricing_explains_a_bad_choice() -> None:
    with gr.Blocks():
        tab = _tab()
    card, button, problem = tab.estimate.update(
        "demo", "onnx", "int8", 32, "auto", True, False, *[""] * len(tab.sidebar.limits)
    )
    assert "Predicted" in card or problem
    assert problem == "" or button.interactive is False
    *_, problem = tab.estimate.update(
        "no/such model", "onnx", "int8", 32, "auto", True, False, *[""] * len(tab.sidebar.limits)
    )
    assert problem


def _tab() -> ExportTab:

    engine = StubEngine()
    return ExportTab(Context(Services(engine), StopTokens(), Sidebar(engine)))


def test_the_jobs_export_and_benchmark_in_processes_of_their_own(tmp_path: Path) -> None:
    source = toys.save_toy("llama", tmp_path / "m")
    spec = read_spec(str(source))
    out = output_folder(spec.name, ExportOptions(precision="int8"))
    assert out.is_relative_to(settings().outputs)
    *_, receipt = export_isolated(ExportRequest(str(source), out, ExportOptions(precision="int8")), CancelToken())
    assert isinstance(receipt, Receipt)
    assert receipt.details["folder"] == str(out)
    assert receipt.measured["ram"] > 0
    assert output_folder(spec.name, ExportOptions(precision="int8")) != out
    assert result_folder(Access(), receipt.details["folder"]) == out.resolve()
    *_, result = benchmark(str(source), out)
    assert isinstance(result, dict)
    assert all(value > 0 for value in result["onnx"]["prefill_tps"])
    assert len(result["torch"]["token_ms"]) == len(result["prompts"])
