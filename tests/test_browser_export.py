"""The Export tab in chromium, on a toy that is really exported, proven, raced and loaded. Screenshots as in test_browser.py."""

from __future__ import annotations

from typing import Any

import pytest
from test_browser import Visit, browser, pytestmark  # noqa: F401  a fixture, and what marks this file
from test_browser_quantize import url  # noqa: F401  a fixture

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
    assert "Same best token" in shown
    assert "Proven" in shown
    page.click("#export-receipt summary >> nth=0")
    assert "import onnxruntime" in page.inner_text("#export-receipt pre")
    visit.shot("proven")
    made = settings().outputs / "Toy-Llama-onnx-int4"
    page.click("#export-receipt summary >> nth=1")
    link = page.locator("#export-receipt a[download='model.onnx.data']").get_attribute("href")
    answer = page.request.get(f"{url.rstrip('/')}/{link}")
    assert answer.body() == (made / "model.onnx.data").read_bytes()
    page.click("#race-start")
    page.wait_for_selector("#race-plot svg", timeout=90_000)
    assert page.locator("#race-plot svg").count() == 2
    page.locator("#race-plot").scroll_into_view_if_needed()
    visit.shot("raced")
    page.click("#export-load")
    page.wait_for_selector("#message textarea", timeout=60_000)
    assert "Toy-Llama-onnx-int4" in page.inner_text("#slim")
    assert "ONNX Runtime" in page.inner_text("#slim")
    visit.send("Hello")
    page.wait_for_selector("#chat .bot")
    visit.shot("loaded")
    visit.close()
