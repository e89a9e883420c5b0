"""The Export tab in chromium, on a toy that is really exported, proven, raced and loaded. Screenshots as in test_browser.py."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys
import transformers
from test_browser import Visit, browser, pytestmark  # noqa: F401  a fixture, and what marks this file
from test_browser_quantize import url  # noqa: F401  a fixture

from lowmem.planning import planner
from lowmem.settings import settings


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("desktop", "dark"), ("phone", "dark")])
def test_export_by_clicking_then_chat(browser: Any, url: str, size: str, scheme: str) -> None:  # noqa: F811
    visit = Visit(browser, url, size, scheme, "export")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Export') >> nth=0")
    page.wait_for_selector("#export-card [data-verdict=fits]")
    assert "TensorRT needs an NVIDIA GPU" in page.inner_text("#export-form")
    page.click("#export-precision label:has-text('int4')")
    page.wait_for_selector("#export-group")
    visit.shot("form")
    page.click("#export-start")
    page.wait_for_selector("#export-load", timeout=90_000)
    shown = page.inner_text("#export-receipt")
    assert "Top-1 match" in shown
    assert "Verified" in shown
    page.click("#export-receipt summary >> nth=0")
    assert "import onnxruntime" in page.inner_text("#export-receipt pre")
    visit.shot("proven")
    made = settings().outputs / "Toy-Llama-onnx-int4"
    page.click("#export-receipt summary >> nth=1")
    link = page.locator("#export-receipt a[download='model.onnx.data']").get_attribute("href")
    answer = page.request.get(f"{url.rstrip('/')}/{link}")
    assert answer.body() == (made / "model.onnx.data").read_bytes()
    page.click("#benchmark-start")
    page.wait_for_selector("#benchmark-plot svg", timeout=90_000)
    assert page.locator("#benchmark-plot svg").count() == 2
    page.locator("#benchmark-plot").scroll_into_view_if_needed()
    visit.shot("raced")
    page.click("#export-load")
    page.wait_for_selector("#message textarea", timeout=60_000)
    assert "Toy-Llama-onnx-int4" in page.inner_text("#slim")
    assert "ONNX Runtime" in page.inner_text("#slim")
    visit.send("Hello")
    page.wait_for_selector("#chat .bot")
    visit.shot("loaded")
    visit.close()


def test_stop_while_the_first_load_writes_a_graph_then_load_again(
    browser: Any,  # noqa: F811
    url: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "GRAPH_PARAMETERS", 1)
    deep = toys.config("llama")
    deep.num_hidden_layers = 60  # so that writing takes a while
    transformers.AutoModelForCausalLM.from_config(deep).save_pretrained(settings().models / "demo")
    visit = Visit(browser, url, "desktop", "light", "first-load")
    page = visit.page
    page.click("#load")
    _wait(lambda: any(path.suffix == ".part" for path in _kept_graphs()))
    page.click("#stop-load")
    page.wait_for_selector("#setup-notice:has-text('Stopped')", timeout=2000)
    page.wait_for_selector("#load:not([disabled])", timeout=1000)
    visit.shot("stopped")
    assert _kept_graphs() == []
    assert not any(map(_is_job, psutil.Process().children(recursive=True)))
    page.click("#load")
    page.wait_for_selector("#message textarea", timeout=60_000)
    assert "ONNX Runtime" in page.inner_text("#slim")
    assert [path.suffix for path in _kept_graphs()] == [""]
    visit.close()


def _is_job(child: psutil.Process) -> bool:
    with suppress(psutil.Error):  # it has ended
        return "lowmem.jobs" in child.cmdline()
    return False


def _kept_graphs() -> list[Path]:
    """All that lies where graphs are kept, but for locks."""
    return [path for path in (settings().home / "graphs").glob("*") if not path.name.startswith(".")]


def _wait(done: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
