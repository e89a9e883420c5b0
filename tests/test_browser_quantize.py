"""The Quantize tab in chromium, on a toy that is really quantized, compared and loaded. Screenshots as in test_browser.py."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
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
    demo = build_ui(Engine(), model="demo")
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield address
    close(demo)


def pick(page: Any, dropdown: str, label: str) -> None:
    page.click(f"#{dropdown} input")
    page.click(f"[role=option]:has-text('{label}') >> nth=0")


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_quantize_by_clicking_then_chat(browser: Any, url: str, size: str, scheme: str) -> None:  # noqa: F811
    visit = Visit(browser, url, size, scheme, "quantize")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Quantize') >> nth=0")
    page.click("#quant-method label:has-text('Round to nearest')")
    page.wait_for_selector("#quantize-problem [role=alert]")
    assert "Groups of 64 do not divide the 96 inputs" in page.inner_text("#quantize-problem")
    assert page.is_disabled("#quantize-start")
    pick(page, "quant-group", "32")
    page.wait_for_selector("#quantize-start:not([disabled])")
    assert "Bits per quantized weight" in page.inner_text("#quantize-card")
    assert not page.is_visible("#quantize-problem")
    visit.shot("ready")
    page.click("#quantize-start")
    page.wait_for_selector("#quantize-load", timeout=60_000)
    receipt = page.inner_text("#quantize-receipt")
    assert "Relative loss" in receipt
    assert "predicted" in receipt
    page.click("#quantize-receipt summary")
    visit.shot("receipt")
    made = settings().outputs / "Toy-Llama-rtn-4bit-g32"
    link = page.locator("#quantize-receipt a[download='model.safetensors']").get_attribute("href")
    answer = page.request.get(f"{url.rstrip('/')}/{link}")
    assert answer.body() == (made / "model.safetensors").read_bytes()
    page.click("#quantize-load")
    page.wait_for_selector("#message textarea", timeout=60_000)
    assert "Toy-Llama-rtn-4bit-g32" in page.inner_text("#slim")
    visit.send("Hello")
    page.wait_for_selector("#chat .bot")
    visit.shot("loaded")
    visit.close()


def test_how_it_works_draws_the_models_own_weights(browser: Any, url: str) -> None:  # noqa: F811
    visit = Visit(browser, url, "desktop", "light", "explain")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Quantize') >> nth=0")
    page.click("#quantize-modes button[role=tab]:has-text('How it works')")
    page.click("#explain-start")
    page.wait_for_selector("#explain-pictures svg", timeout=60_000)
    assert page.locator("#explain-pictures svg").count() == 2
    visit.shot("pictures")
    visit.close()


def test_variants_side_by_side(browser: Any, url: str, tmp_path: Path) -> None:  # noqa: F811
    visit = Visit(browser, url, "desktop", "dark", "compare")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Quantize') >> nth=0")
    page.click("#quantize-modes button[role=tab]:has-text('Compare')")
    page.click("#compare-options > button")
    for option, value in (("tokens", 272), ("window", 64), ("stride", 32), ("prompt_tokens", 16), ("new_tokens", 4)):
        field = page.locator(f"#measure-{option} input[type=number]")
        field.fill(str(value))
        field.blur()
    page.click("#compare-options > button")
    for variant in ("bf16", "hqq:4:64"):
        page.click(f"#compare-variants label:has-text('{variant}')")
    page.click("#compare-start")
    page.wait_for_selector("#compare-table tbody tr", timeout=120_000)
    visit.shot("growing")
    page.wait_for_selector("#compare-csv", timeout=120_000)
    assert page.locator("#compare-table tbody tr").count() == 3
    assert page.locator("#compare-plots svg").count() == 1
    with page.expect_download() as download:
        page.click("#compare-csv")
    download.value.save_as(tmp_path / "comparison.csv")
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 4
    visit.shot("compared")
    visit.close()


def test_a_sweep_by_clicking_grows_stops_and_goes_on(browser: Any, url: str) -> None:  # noqa: F811
    visit = Visit(browser, url, "desktop", "light", "sweep")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Quantize') >> nth=0")
    page.click("#quantize-modes button[role=tab]:has-text('Compare')")
    page.click("#compare-options > button")
    for option, value in (("tokens", 272), ("window", 64), ("stride", 32), ("prompt_tokens", 16), ("new_tokens", 4)):
        field = page.locator(f"#measure-{option} input[type=number]")
        field.fill(str(value))
        field.blur()
    page.click("#sweep > button")
    page.click("#sweep-groups label:has-text('64')")
    page.wait_for_selector("#sweep-count:has-text('3 runs')")
    page.click("#sweep-groups label:has-text('32')")
    page.wait_for_selector("#sweep-count:has-text('7 runs')")  # fp32, int8, bf16 and two methods with two widths
    visit.shot("chosen")
    page.click("#sweep-start")
    page.wait_for_selector("#sweep-table tbody tr >> nth=1", timeout=120_000)
    assert page.locator("#sweep-plots svg").count() == 1
    visit.shot("growing")
    clicked = time.monotonic()
    page.click("#sweep-stop")
    page.wait_for_selector("#sweep-start:not([disabled])")
    assert time.monotonic() - clicked < 2
    rows = page.locator("#sweep-table tbody tr").count()
    assert 2 <= rows < 7
    page.click("#sweep-start")
    page.wait_for_selector(f"#sweep-table tbody tr >> nth={rows - 1}", timeout=30_000)  # kept, not measured again
    page.wait_for_selector("#sweep-notes .lm-files", state="attached", timeout=120_000)
    assert page.locator("#sweep-table tbody tr").count() == 7
    assert page.locator("#sweep-plots svg .point").count() == 7
    visit.shot("swept")
    visit.close()
