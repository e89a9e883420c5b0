"""The Long Context tab in chromium, on a toy that really reads and writes. Screenshots as in test_browser.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_browser import Visit, browser, pytestmark  # noqa: F401  a fixture, and what marks this file
from test_browser_quantize import url  # noqa: F401  a fixture
from test_longctx_sources import server  # noqa: F401  a fixture

from lowmem.datasets import long_text as sources

STORY = "The river runs to the sea, and the sea does not ask from where. " * 20


def tab(visit: Visit) -> Any:
    """The tab, with the toy loaded and a window that it can see."""
    page = visit.page
    page.click("#load")
    page.wait_for_selector("#message textarea", timeout=60_000)
    page.click("#tabs button[role=tab]:has-text('Long Context') >> nth=0")
    page.fill("#long-text textarea", STORY)
    page.wait_for_selector('#long-memory :text("the model\'s 512 positions")')
    fill(page, "long-window", 64)
    page.wait_for_selector("#long-memory :text('64 + 4 tokens')")
    return page


def fill(page: Any, control: str, value: float) -> None:
    field = page.locator(f"#{control} input[type=number]")
    field.fill(str(value))
    field.blur()


def mode(page: Any, name: str) -> None:
    page.click(f"#longctx-modes button[role=tab]:has-text('{name}')")


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_text_without_end_and_what_can_be_measured_of_one(
    browser: Any,  # noqa: F811
    url: str,  # noqa: F811
    tmp_path: Path,
    size: str,
    scheme: str,
) -> None:
    visit = Visit(browser, url, size, scheme, "longctx")
    page = tab(visit)
    before = page.text_content("#long-memory")
    page.click("#long-kv input")
    page.click("[role=option]:has-text('4 bits') >> nth=0")
    page.wait_for_function("before => document.querySelector('#long-memory').textContent !== before", arg=before)
    visit.shot("priced")
    page.click("#long-continue-start")
    page.wait_for_function("document.querySelector('#long-output textarea').value.length > 900")
    visit.shot("writing")
    clicked = time.monotonic()
    page.click("#long-continue-stop")
    page.wait_for_selector("#long-continue-start:not([disabled])")
    assert time.monotonic() - clicked < 1.5
    assert "no limit" in page.inner_text("#long-live")
    visit.shot("stopped")

    mode(page, "Perplexity")
    page.click("#long-perplexity-start")
    page.wait_for_selector("#long-perplexity-result dl", timeout=60_000)
    assert page.locator("#long-perplexity-plot svg").count() == 1
    visit.shot("perplexity")
    mode(page, "Hidden states")
    page.click("#long-hidden-start")
    page.wait_for_selector("#long-hidden-notice [role=alert]")
    assert "A stride of 512 does not work with windows of 64 tokens" in page.inner_text("#long-hidden-notice")
    fill(page, "long-stride", 32)
    page.click("#long-hidden-start")
    with page.expect_download() as download:
        page.click("#long-hidden-result a", timeout=60_000)
    download.value.save_as(tmp_path / "states.npy")
    assert np.load(tmp_path / "states.npy").shape == (len(STORY), 64)
    visit.shot("hidden")
    mode(page, "Recall test")
    page.click("#long-recall-start")
    page.wait_for_selector("#long-recall-result tbody tr >> nth=1", timeout=60_000)
    visit.shot("recall")
    visit.close()


def test_a_text_from_an_address_and_why_one_cannot_be_had(
    browser: Any,  # noqa: F811
    url: str,  # noqa: F811
    server: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visit = Visit(browser, url, "desktop", "light", "longctx-address")
    page = tab(visit)
    mode(page, "Perplexity")

    def read(path: str) -> None:
        page.fill("#long-address input", server + path)
        page.press("#long-address input", "Enter")
        page.click("#long-perplexity-start:not([disabled])")

    read("/page")
    page.wait_for_selector("#long-perplexity-notice :text('127.0.0.1 is not on the public network.')")
    visit.shot("refused")
    monkeypatch.setattr(sources, "is_public", lambda ip: ip == "127.0.0.1")
    for path, sentence in (
        ("/missing", "returned status 404."),
        ("/huge", "The text is larger than the 4.00 MB allowed."),
        ("/pdf", "The URL returned application/pdf, not text."),
        ("/inside", "169.254.169.254 is not on the public network."),
    ):
        read(path)
        page.wait_for_selector(f"#long-perplexity-notice :text('{sentence}')")
    read("/page")
    page.wait_for_selector("#long-perplexity-result :text-is('12')", timeout=60_000)  # of 13 bytes, after the first
    assert not page.inner_text("#long-perplexity-notice").strip()
    visit.shot("read")
    visit.close()


def test_the_exercise_in_one_click(browser: Any, url: str, tmp_path: Path) -> None:  # noqa: F811
    visit = Visit(browser, url, "desktop", "light", "longctx-exercise")
    page = tab(visit)
    mode(page, "Cache strategies")
    for option, value in (("tokens", 300), ("window", 64), ("points", 2)):
        fill(page, f"strategies-{option}", value)
    page.click("#long-strategies-start")
    page.wait_for_selector("#long-strategies-files a", timeout=180_000)
    assert page.locator("#long-strategies-table tbody tr").count() == 5
    assert page.locator("#long-strategies-plots svg").count() == 1
    with page.expect_download() as download:
        page.click("#long-strategies-files a[download='strategies.csv']")
    download.value.save_as(tmp_path / "strategies.csv")
    assert len((tmp_path / "strategies.csv").read_text().splitlines()) == 11
    visit.shot("measured")
    visit.close()
