"""The Offload tab in chromium, on a toy whose blocks are really streamed. Screenshots as in test_browser.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import toys
from test_browser import Visit, browser, pytestmark  # noqa: F401  a fixture, and what marks this file
from ui_stub import close

from lowmem.settings import settings
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.engine import Engine


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page over the real engine, with a toy as the demo model."""
    monkeypatch.setattr("lowmem.ui.launch.measure_runtime_bytes", lambda: 0)
    folder = settings().models / "demo"
    toys.save_toy("llama", folder)
    (folder / "source.json").write_text(json.dumps({"ref": "demo", "name": "Toy-Llama", "licence": "mit"}))
    engine = Engine()
    demo = build_ui(engine, model="demo")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield address
    close(demo)
    engine.unload()


def fill(page: Any, slider: str, value: float) -> None:
    field = page.locator(f"#{slider} input[type=number]")
    field.fill(str(value))
    field.blur()


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_offload_by_clicking(browser: Any, url: str, size: str, scheme: str) -> None:  # noqa: F811
    visit = Visit(browser, url, size, scheme, "offload")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Offload') >> nth=0")
    page.wait_for_selector("#offload-picture .lm-pace", timeout=60_000)
    assert page.locator("#offload-picture .lm-blocks i:not(.lm-end)").count() == 2
    visit.shot("ready")

    page.click("#offload-where label:has-text('Selected blocks')")
    page.fill("#offload-disk-list input, #offload-disk-list textarea", "0-9")
    page.wait_for_selector("#offload-problem [role=alert]")
    assert "There are no blocks 0-9" in page.inner_text("#offload-problem")
    assert page.is_disabled("#offload-start")
    visit.shot("refused")
    page.fill("#offload-disk-list input, #offload-disk-list textarea", "1")
    page.wait_for_selector("#offload-picture .lm-blocks [data-place=mapped]")
    page.wait_for_selector("#offload-start:not([disabled])")

    fill(page, "offload-tokens", 4)
    page.click("#offload-start")
    page.wait_for_selector("#offload-measured .lm-against", timeout=60_000)
    assert page.input_value("#offload-text textarea")
    assert "Time per token" in page.inner_text("#offload-measured")
    visit.shot("ran")
    visit.close()


def test_the_exercise_by_one_click_and_its_stop(browser: Any, url: str) -> None:  # noqa: F811
    visit = Visit(browser, url, "desktop", "dark", "offload-methods")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Offload') >> nth=0")
    page.wait_for_selector("#offload-picture .lm-blocks")
    fill(page, "offload-tokens", 3)
    page.click("#offload-compare-start")
    page.wait_for_selector("#offload-table tbody tr >> nth=1", timeout=120_000)
    visit.shot("growing")
    clicked = time.monotonic()
    page.click("#offload-compare-stop")
    page.wait_for_selector("#offload-compare-start:not([disabled])")
    assert time.monotonic() - clicked < 2
    assert page.locator("#offload-table tbody tr").count() < 6
    visit.shot("stopped")
    page.click("#offload-compare-start")
    page.wait_for_selector("#offload-table tbody tr >> nth=5", timeout=240_000)
    page.wait_for_selector("#offload-compare-start:not([disabled])")
    assert page.locator("#offload-plot svg").count() == 1
    assert "accelerate" in page.inner_text("#offload-table")
    visit.shot("compared")
    visit.close()
