"""Take the README's pictures: the real app with its demo model, driven in Debian's chromium.

python -m benchmarks.pictures [NAME...]     all of them, or those named, into docs/

Each picture is a scene: what a person would click before they look. `lowmem.gif` is a film of the first minute.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.common import ROOT
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.engine import Engine

DOCS = ROOT.parent / "docs"
DESKTOP, PHONE, FILM = (1280, 900), (390, 844), (1120, 700)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
QUESTION = "Explain why the sky is blue."
LONG = 240_000
"""Milliseconds that a scene may take to measure something."""

FILM_WIDTH, FILM_COLORS, FRAME_SECONDS, LONGEST_FRAME_SECONDS = 840, 128, 0.12, 0.5

HIDDEN = "#hub-notice { display: none !important }"
"""Without the hub the page says so, which is not what the pictures are of."""

Scene = Callable[[Any], None]


@contextmanager
def _page(browser: Any, url: str, size: tuple[int, int], scheme: str = "light") -> Iterator[Any]:
    """A visitor's page, once it has settled."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=size == PHONE
    )
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(f"{url.rstrip('/')}/?__theme={scheme}")
    page.wait_for_selector("#load:not([disabled])")
    page.wait_for_selector("body.lm-settled")
    page.add_style_tag(content=HIDDEN)
    yield page
    context.close()


def _tab(page: Any, name: str) -> None:
    page.click(f"#tabs button[role=tab]:has-text('{name}') >> nth=0")


def _fill(page: Any, element: str, value: float) -> None:
    field = page.locator(f"#{element} input[type=number]")
    field.fill(str(value))
    field.blur()


def _pretend(page: Any) -> None:
    """A small machine, on which the budget's shares can be seen."""
    page.click("#pretend label:has-text('2 GB') >> nth=0")
    page.wait_for_selector("#budget:has-text('2.00 GB')")


def _load(page: Any) -> None:
    """The recommended model, unless it is resident."""
    if page.is_visible("#load"):
        page.click("#load")
    page.wait_for_selector("#message textarea")


def _ask(page: Any, tokens: int) -> None:
    _fill(page, "option-max_new_tokens", tokens)
    page.fill("#message textarea", QUESTION)
    page.keyboard.press("Enter")


def first(page: Any) -> None:
    page.wait_for_selector("#budget .lm-pill")


def over(page: Any) -> None:
    page.click("#choose > button")
    page.click("#precision input")
    page.click("[role=option]:has-text('fp32') >> nth=0")
    page.fill("#model input", "demo")
    page.keyboard.press("Enter")
    page.wait_for_selector("#load:has-text('fp32')")
    _fill(page, "ram-budget", 1)
    page.wait_for_selector("#card:has-text('makes it fit')")


def chat(page: Any) -> None:
    if page.viewport_size["width"] > PHONE[0]:  # whose sidebar is folded away
        _pretend(page)
    _load(page)
    _ask(page, 160)
    page.wait_for_selector("#message .stop-button")
    page.wait_for_selector("#message .submit-button")
    page.wait_for_selector("#receipt:has-text('decode')", state="attached")


def quantize(page: Any) -> None:
    _tab(page, "Quantize")
    page.click("#quant-method label:has-text('HQQ')")
    page.wait_for_selector("#quantize-start:not([disabled])")
    page.click("#quantize-start")
    page.wait_for_selector("#quantize-load", timeout=LONG)


def how(page: Any) -> None:
    _tab(page, "Quantize")
    page.click("#quantize-modes button[role=tab]:has-text('How it works')")
    page.click("#explain-start")
    page.wait_for_selector("#explain-pictures svg", timeout=LONG)


def compare(page: Any) -> None:
    _tab(page, "Quantize")
    page.click("#quantize-modes button[role=tab]:has-text('Compare')")
    page.click("#compare-options > button")
    for option, value in (("tokens", 512), ("window", 256), ("stride", 128), ("prompt_tokens", 64), ("runs", 1)):
        _fill(page, f"measure-{option}", value)
    page.click("#compare-options > button")
    page.click("#compare-example")
    page.wait_for_selector("#compare-csv:visible", timeout=2 * LONG)
    page.evaluate("document.querySelector('#compare-variants').scrollIntoView()")


def offload(page: Any) -> None:
    _tab(page, "Offload")
    page.wait_for_selector("#offload-picture .lm-blocks")
    _fill(page, "offload-ram", 0.95)
    page.wait_for_selector("#offload-picture .lm-pace", timeout=LONG)
    page.wait_for_timeout(1500)
    page.wait_for_selector("#offload-start:not([disabled])")
    page.click("#offload-start")
    page.wait_for_selector("#offload-stop:visible")
    page.wait_for_selector("#offload-start:not([disabled])", timeout=LONG)
    page.wait_for_selector("#offload-measured .lm-against")


def longctx(page: Any) -> None:
    _load(page)
    _tab(page, "Long Context")
    page.click("#longctx-modes button[role=tab]:has-text('Recall test')")
    _fill(page, "long-window", 256)
    page.click("#long-recall-start")
    page.wait_for_selector("#long-recall-result table", timeout=LONG)


def export(page: Any) -> None:
    _tab(page, "Export")
    page.wait_for_selector("#export-card .lm-pill")
    page.click("#export-start")
    page.wait_for_selector("#export-load", timeout=LONG)
    page.click("#benchmark-start")
    page.wait_for_selector("#benchmark-plot svg", timeout=LONG)
    page.evaluate("document.querySelector('#export-receipt').scrollIntoView()")


SCENES: dict[str, tuple[tuple[int, int], str, Scene]] = {
    "first": (DESKTOP, "light", first),
    "over": (DESKTOP, "light", over),
    "chat": (DESKTOP, "light", chat),
    "dark": (DESKTOP, "dark", chat),
    "phone": (PHONE, "dark", chat),
    "longctx": (DESKTOP, "light", longctx),
    "offload": (DESKTOP, "light", offload),
    "quantize": (DESKTOP, "light", quantize),
    "how": (DESKTOP, "light", how),
    "export": (DESKTOP, "light", export),
    "compare": (DESKTOP, "light", compare),
}
"""Picture -> screen, theme, and what is clicked before it is taken."""


def film(browser: Any, url: str) -> None:
    """From the first screen to an answer, the budget beside it, as a GIF of real frames."""
    frames: list[tuple[float, bytes]] = []
    with _page(browser, url, FILM) as page:

        def roll(selector: str, seconds: float, at_least: float = 0.0) -> None:
            """Take frames until `selector` is visible."""
            started = time.perf_counter()
            while (spent := time.perf_counter() - started) < seconds:
                frames.append((time.perf_counter(), page.screenshot(type="png")))
                if spent >= at_least and page.is_visible(selector):
                    return
                page.wait_for_timeout(1000 * FRAME_SECONDS)

        roll("#load", 2.0, 1.0)
        page.click("#pretend label:has-text('2 GB') >> nth=0")
        roll("#load", 2.5, 1.8)
        page.click("#load")
        roll("#message textarea", 60, 0.5)
        _fill(page, "option-max_new_tokens", 110)
        page.type("#message textarea", QUESTION, delay=5)
        roll("#message", 1.0)
        page.keyboard.press("Enter")
        roll("#message .submit-button", 30, 1.0)
        roll("#never", 2.5)
    _write_film(frames)


def _write_film(frames: list[tuple[float, bytes]]) -> None:
    from PIL import Image

    pictures: list[Image.Image] = []
    durations: list[int] = []
    times = [at for at, _ in frames] + [frames[-1][0] + 2.0]
    last: bytes | None = None
    for (at, png), until in zip(frames, times[1:], strict=True):
        duration = int(1000 * min(LONGEST_FRAME_SECONDS if until != times[-1] else 2.0, until - at))
        if png == last:
            durations[-1] += duration
            continue
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image = image.resize((FILM_WIDTH, FILM_WIDTH * image.height // image.width), Image.Resampling.LANCZOS)
        pictures.append(image)
        durations.append(duration)
        last = png
    # One palette for all: what does not change between frames then costs nothing. The commonest colours are kept exactly,
    # the rest of the palette covers small patches.
    counted: Any = pictures[-1].getcolors(1 << 24)
    common = sorted(counted, reverse=True)[: FILM_COLORS // 2]
    covering = pictures[-1].quantize(FILM_COLORS // 2, Image.Quantize.MAXCOVERAGE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([value for _, color in common for value in color] + covering[: 3 * FILM_COLORS // 2])
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in pictures]
    flat[0].save(
        DOCS / "lowmem.gif",
        save_all=True,
        append_images=flat[1:],
        duration=durations,
        loop=0,
        optimize=True,
        disposal=1,
    )


@contextmanager
def _app() -> Iterator[str]:
    """A page on which nothing has happened yet, with what is recommended where only the demo can be had."""
    engine = Engine()
    demo = build_ui(engine)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        yield url
    finally:
        engine.unload()
        demo.close()


def main(names: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    os.environ["HF_HUB_OFFLINE"] = "1"
    measure_runtime_bytes()
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        if not names or "film" in names:
            with _app() as url:
                film(browser, url)
        for name, (size, scheme, scene) in SCENES.items():
            if names and name not in names:
                continue
            with _app() as url, _page(browser, url, size, scheme) as page:
                try:
                    scene(page)
                    page.wait_for_timeout(700)
                finally:
                    page.screenshot(path=DOCS / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
