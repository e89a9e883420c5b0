"""An answer that would have the browser fetch something from elsewhere: no request leaves the page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
import ui_stub
from test_browser import Visit, browser, stub_url  # noqa: F401  fixtures
from test_browser import pytestmark as in_browser

from lowmem.ui.headers import HEADERS


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server on this machine, and what is fetched from it."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", fetched
    server.shutdown()


def answer(address: str) -> str:
    return "\n\n".join(
        [
            f"![a]({address}/markdown.png)",
            f"<img src='{address}/html.png' srcset='{address}/srcset.png 2x'>",
            f"<div style='height:9px;background:url({address}/css.png)'>b</div>",
            f"<style>body {{ background: url({address}/style.png) }}</style>",
            f"<video src='{address}/video.mp4' poster='{address}/poster.png' autoplay></video>",
            f"<svg><image href='{address}/svg.png'/></svg><iframe src='{address}/frame'></iframe>",
            f"<link rel=stylesheet href='{address}/link.css'><script src='{address}/script.js'></script>",
            "the end",
        ]
    )


def test_every_answer_has_the_headers(stub_url: str) -> None:  # noqa: F811
    for path in ("", "config", "gradio_api/info", "theme.css"):
        found = httpx.get(stub_url + path).headers
        assert {name: found[name] for name in HEADERS} == HEADERS


@in_browser[0]
@in_browser[1]
def test_an_answer_loads_nothing_from_elsewhere(
    browser: Any,  # noqa: F811
    stub_url: str,  # noqa: F811
    elsewhere: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, fetched = elsewhere
    monkeypatch.setattr(ui_stub, "WORDS", answer(address).split(" "))
    visit = Visit(browser, stub_url, "desktop", "light", "answers")
    assert visit.complaints == []
    visit.page.click("#load")
    visit.page.wait_for_selector("#message textarea")
    visit.limit_answer(len(ui_stub.WORDS))
    visit.send("What do you see?")
    visit.page.wait_for_selector("#chat :text('the end')")
    visit.page.wait_for_timeout(2000)
    assert visit.page.locator("#chat img").count() > 0  # else nothing was tried
    visit.context.close()
    assert fetched == []
