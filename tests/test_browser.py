"""The page in Debian's chromium: every click of a first visit, at two sizes, light and dark.

Against a stub engine (fast), and against `python app.py` on the demo model. Screenshots land in tests/screenshots.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import own_process
import pytest
from ui_stub import StubEngine, close

from lowmem.settings import settings
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "tests" / "screenshots"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def stub_url() -> Iterator[str]:
    demo = build_ui(StubEngine())
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield url
    close(demo)


class Visit:
    """One visitor: the page, the size of their screen, and what the console complained about."""

    def __init__(self, browser: Any, url: str, size: str, scheme: str, label: str, locale: str = "en-US") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            has_touch=size == "phone",
            locale=locale,
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.phone, self.label, self.shots = size == "phone", f"{label}-{size}-{scheme}", 0
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self._complain(message.type, message.text))
        self.page.on("pageerror", lambda error: self._complain("error", str(error)))
        self.page.goto(f"{url.rstrip('/')}/?__theme={scheme}")
        self.page.wait_for_selector(f"#load:not([disabled]):not(:has-text('{'Finding what fits'}'))")
        self.page.wait_for_selector("body.lm-settled")

    def _complain(self, kind: str, text: str) -> None:
        if kind == "error":
            self.complaints.append(text)

    def shot(self, name: str) -> None:
        """A screenshot, and nothing may stick out sideways."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.shots += 1
        self.page.wait_for_timeout(350)
        self.page.screenshot(path=SCREENSHOTS / f"{self.label}-{self.shots}-{name}.png")
        assert self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0

    @contextmanager
    def sidebar(self) -> Iterator[None]:
        """On a phone the sidebar is opened for the block."""
        if self.phone:
            self._toggle()
        yield
        if self.phone:
            self._toggle()

    def _toggle(self) -> None:
        self.page.click("#sidebar .toggle-button")
        self.page.wait_for_timeout(450)

    def set_budget(self, gigabytes: float) -> None:
        field = self.page.locator("#ram-budget input[type=number]")
        field.fill(str(gigabytes))
        field.blur()

    def limit_answer(self, tokens: int) -> None:
        field = self.page.locator("#option-max_new_tokens input[type=number]")
        field.fill(str(tokens))
        field.blur()

    def send(self, message: str) -> None:
        self.page.fill("#message textarea", message)
        self.page.keyboard.press("Enter")

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []


def first_visit(browser: Any, url: str, size: str, scheme: str, label: str, *, load_seconds: float = 30) -> None:
    """Everything a newcomer does, from the recommended set-up to Unload."""
    visit = Visit(browser, url, size, scheme, label)
    page = visit.page
    assert re.match(r"Load .+ in \w+ and chat", page.inner_text("#load"))
    assert "Fits" in page.text_content("#budget")
    visit.shot("first")

    with visit.sidebar():
        visit.set_budget(0.2)
        page.wait_for_selector("#budget [data-verdict=over] >> nth=0")
        visit.shot("over")
    assert page.inner_text("#load") == "Doesn't fit"
    assert page.is_visible("#anyway")
    assert "more than the budget" in page.inner_text("#card")
    visit.shot("over-card")
    with visit.sidebar():
        page.click("#pretend label:last-child")
        page.wait_for_selector("#budget [data-verdict=fits] >> nth=0")
    page.wait_for_selector("#load:not([disabled])")

    page.click("#load")
    page.wait_for_selector("#message textarea", timeout=1000 * load_seconds)
    page.wait_for_function("document.activeElement?.closest('#message')")
    assert not page.is_visible("#load")
    visit.shot("loaded")

    visit.limit_answer(1500)  # longer than it takes to press Stop
    visit.send("Tell a very long story about the keeper of a lighthouse.")
    page.wait_for_function("document.querySelector('#chat .bot')?.innerText.trim().length > 10")
    page.wait_for_selector("#chat-live .lm-context")
    visit.shot("streaming")
    clicked = time.monotonic()
    page.click("#message .stop-button")
    page.wait_for_selector("#message .submit-button")
    assert time.monotonic() - clicked < 1.5
    before = page.inner_text("#chat")
    page.wait_for_timeout(600)
    assert page.inner_text("#chat") == before
    assert "tok/s" in page.inner_text("#chat-live")
    visit.shot("stopped")

    with visit.sidebar():
        page.wait_for_selector("#receipt .lm-against")
        page.locator("#receipt").scroll_into_view_if_needed()
        assert "predicted" in page.inner_text("#receipt")
        visit.shot("receipt")

    page.click("#modes button[role=tab]:has-text('Batch')")
    page.fill("#prompts textarea", "Name a river.\nName <b>two</b> colours.")
    visit.limit_answer(8)
    page.click("#batch-start")
    page.wait_for_selector("#csv", timeout=60_000)
    assert page.locator("#batch-table tbody tr").count() == 2
    assert "<b>two</b>" in page.inner_text("#batch-table")
    visit.shot("batch")

    page.click("#unload-bar")
    page.wait_for_selector("#load:visible:not([disabled])")
    assert "No model is loaded" in page.text_content("#resident")
    visit.shot("unloaded")
    visit.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", list(SIZES))
def test_a_first_visit(browser: Any, stub_url: str, size: str, scheme: str) -> None:
    first_visit(browser, stub_url, size, scheme, "stub")


@pytest.mark.parametrize("size", list(SIZES))
def test_choosing_something_else(browser: Any, stub_url: str, size: str) -> None:
    visit = Visit(browser, stub_url, size, "light", "choose")
    page = visit.page
    page.click("#choose > button")
    page.fill("#model input", "no such model")
    page.keyboard.press("Enter")
    page.wait_for_selector("#setup-problem [role=alert]")
    assert "is not the name of a model" in page.inner_text("#setup-problem")
    assert page.is_disabled("#load")
    visit.shot("unknown")
    page.fill("#model input", "demo")
    page.keyboard.press("Enter")
    page.wait_for_selector("#load:has-text('SmolLM2-135M')")
    assert not page.is_visible("#setup-problem")
    assert "free on disk" in page.inner_text("#card")
    before = page.text_content("#budget")
    page.locator("#context input[type=number]").fill("8192")
    page.locator("#context input[type=number]").blur()
    page.wait_for_function("before => document.querySelector('#budget').textContent !== before", arg=before)
    visit.shot("chosen")
    visit.close()


def test_a_failure_stays_in_place_and_the_page_goes_on(browser: Any, stub_url: str) -> None:
    visit = Visit(browser, stub_url, "desktop", "light", "failure")
    page = visit.page
    page.click("#load")
    page.wait_for_selector("#message textarea")
    visit.send("boom")
    page.wait_for_selector("#chat-notice [role=alert]")
    assert "Something went wrong inside lowmem" in page.inner_text("#chat-notice")
    visit.shot("bug")
    visit.send("What is a KV cache?")
    page.wait_for_selector("#chat .bot")
    assert not page.is_visible("#chat-notice")
    visit.close()


def test_a_browser_in_portuguese_reads_portuguese(browser: Any, stub_url: str) -> None:
    visit = Visit(browser, stub_url, "desktop", "light", "portuguese", locale="pt-BR")
    page = visit.page
    assert page.evaluate("document.documentElement.lang") == "pt-BR"
    assert page.is_visible("#tabs button[role=tab]:has-text('Gerar') >> nth=0")
    assert "Carregar" in page.inner_text("#load")
    assert "Orçamento de memória" in page.inner_text("#budget")
    page.click("#load")
    page.wait_for_selector("#message textarea")
    assert page.get_attribute("#message textarea", "placeholder") == "Escreva uma mensagem"
    visit.send("boom")
    page.wait_for_selector("#chat-notice [role=alert]")
    assert "Algo deu errado dentro do lowmem" in page.inner_text("#chat-notice")
    page.click("#learn-generate > button")
    page.wait_for_selector("#learn-generate-text .lm-sizes")
    assert "SmolLM2" in page.inner_text("#learn-generate-text")
    visit.shot("learn")
    visit.close()


def test_only_a_chat_has_a_system_prompt(browser: Any, stub_url: str) -> None:
    visit = Visit(browser, stub_url, "desktop", "light", "system")
    page = visit.page
    page.click("#load")
    page.wait_for_selector("#system textarea")
    for mode in ("Completion", "Batch"):
        page.click(f"#modes button[role=tab]:has-text('{mode}') >> nth=0")
        page.wait_for_selector("#system", state="hidden")
    page.click("#modes button[role=tab]:has-text('Chat') >> nth=0")
    page.wait_for_selector("#system textarea")
    visit.close()


def test_a_button_holds_its_label_on_a_phone(browser: Any, stub_url: str) -> None:
    visit = Visit(browser, stub_url, "phone", "light", "label", locale="pt-BR")
    page = visit.page
    page.click("#tabs button[role=tab]:has-text('Offload') >> nth=0")
    button = page.locator("#offload-compare-start")
    button.scroll_into_view_if_needed()
    visit.shot("button")
    room = button.evaluate(
        """button => {
            const range = document.createRange();
            range.selectNodeContents(button);
            return (button.getBoundingClientRect().width - range.getBoundingClientRect().width) / 2;
        }"""
    )
    assert room >= 12
    visit.close()


def test_every_tab_and_page_follows_the_loaded_model(browser: Any, stub_url: str) -> None:
    visit = Visit(browser, stub_url, "desktop", "light", "follow")
    other = Visit(browser, stub_url, "desktop", "light", "follow-other")
    page = visit.page
    assert other.page.is_visible("#load")
    page.click("#load")
    page.wait_for_selector("#message textarea")
    visit.send("What is a KV cache?")
    page.wait_for_selector("#chat .bot")
    page.click("#tabs button[role=tab]:has-text('Long Context') >> nth=0")
    page.wait_for_function("!document.querySelector('#long-memory').textContent.includes('Load a model')")
    other.page.wait_for_selector("#message textarea")
    assert not other.page.is_visible("#load")
    page.click("#tabs button[role=tab]:has-text('Generate') >> nth=0")
    page.click("#unload-bar")
    other.page.wait_for_selector("#load:visible")
    page.wait_for_function("document.querySelector('#long-memory').textContent.includes('Load a model')")
    other.close()
    visit.close()


@pytest.mark.real
@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_a_first_visit_on_the_demo_model(browser: Any, demo_home: Path, size: str, scheme: str) -> None:
    with own_process.app(demo_home) as url:
        first_visit(browser, url, size, scheme, "real", load_seconds=300)


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_what_is_on_the_disk_is_deleted_by_two_clicks(browser: Any, stub_url: str, size: str, scheme: str) -> None:
    made = settings().outputs / "tiny-rtn-4bit"
    made.mkdir(parents=True)
    (made / "model.safetensors").write_bytes(bytes(3_000_000))
    visit = Visit(browser, stub_url, size, scheme, "disk")
    page = visit.page
    page.get_by_role("button", name="Stored on this machine", exact=False).first.click()
    page.locator("#stored-which input").click()
    page.get_by_role("option", name="tiny-rtn-4bit · result · 3.00 MB").click()
    page.locator("#delete-stored:not([disabled])").click()
    sure = page.locator("#delete-stored", has_text="Delete permanently?")
    sure.wait_for()
    visit.shot("sure")
    assert made.exists()
    sure.click()
    page.locator("#stored-notice", has_text="Freed {size}.".format(size="3.00 MB")).wait_for()
    assert not made.exists()
    visit.shot("deleted")
    visit.close()
