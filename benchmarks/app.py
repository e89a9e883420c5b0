"""The web app: seconds to its first page, and what its streaming costs the engine.

    python -m benchmarks.app [--runs 5]

Start: from `python app.py` to the page's answer, and to the Load button in a real browser.
Streaming: the engine's own decode speed on the command line, against the same answer streamed
by the app, and against the page's chat in a browser that shares the machine; interleaved, medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from gradio_client import Client
from playwright.sync_api import Page, sync_playwright

from benchmarks.common import ROOT, free_port, lowmem, save, table

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
]
PROMPT = "Write a long story about a lighthouse keeper."
NEW_TOKENS = 128
START_SECONDS = 60


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    starts = [start_once() for _ in range(runs)]
    rates = stream(runs)
    rows: list[dict[str, Any]] = [
        {"figure": "seconds to the first page", "value": round(median([s[0] for s in starts]), 2)},
        {"figure": "seconds to the Load button in Chromium", "value": round(median([s[1] for s in starts]), 2)},
        {"figure": "torch loaded by then", "value": any(s[2] for s in starts)},
        {"figure": "decode tok/s, engine alone", "value": round(median(rates["engine"]), 1)},
        {"figure": "decode tok/s, streamed by the app", "value": round(median(rates["streamed"]), 1)},
        {"figure": "streaming costs", "value": cost(rates["streamed"], rates["engine"])},
        {"figure": "decode tok/s, with a browser on the same cores", "value": round(median(rates["browser"]), 1)},
        {"figure": "streaming and the browser cost", "value": cost(rates["browser"], rates["engine"])},
    ]
    print(table(rows))
    save("app", rows, [f"median of {runs}; {NEW_TOKENS} new tokens, greedy, int8"])


def cost(slower: list[float], faster: list[float]) -> str:
    """How much slower, as the median of the rounds' ratios."""
    return f"{1 - median([s / f for s, f in zip(slower, faster, strict=True)]):.1%}"


@contextlib.contextmanager
def running_app() -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """`python app.py` on a free port: (address, process, when it was started)."""
    port, started = free_port(), time.perf_counter()
    command = [sys.executable, "app.py", "--model", "demo", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT.parent, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}/", process, started
    finally:
        process.terminate()
        process.wait(20)


def wait_for(address: str) -> None:
    deadline = time.perf_counter() + START_SECONDS
    while time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"no page from {address} within {START_SECONDS} s")


def start_once() -> tuple[float, float, bool]:
    """Seconds to the first answer, seconds to a clickable page, whether torch was loaded."""
    with sync_playwright() as play, running_app() as (address, process, started):
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        wait_for(address)
        answered = time.perf_counter() - started
        page = browser.new_page()
        page.goto(address)
        load_button(page).wait_for(timeout=30_000)
        clickable = time.perf_counter() - started
        with_torch = "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        browser.close()
    return answered, clickable, with_torch


def load_button(page: Page):  # type: ignore[no-untyped-def]
    return page.get_by_role("button", name="Load").first


def stream(runs: int) -> dict[str, list[float]]:
    """Decode tokens per second of the same answer: by the engine alone, streamed by the app, shown in a browser."""
    rates: dict[str, list[float]] = {"engine": [], "streamed": [], "browser": []}
    with sync_playwright() as play, running_app() as (address, _, _):
        wait_for(address)
        client = Client(address, verbose=False)
        client.predict("demo", "int8", 8192, api_name="/load")
        for run in range(runs + 1):
            options = {"max_new_tokens": NEW_TOKENS, "greedy": True}
            *_, last = client.submit(PROMPT, options, False, api_name="/generate")
            browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            seen = chat_once(browser.new_page(), address, client)
            browser.close()
            alone = lowmem(
                "generate", "demo", "--prompt", PROMPT, "--greedy", "--precision", "int8",
                "--max-new-tokens", NEW_TOKENS, "--context", 8192,
            )  # fmt: skip
            receipts = {"engine": alone, "streamed": last["receipt"], "browser": seen}
            if len({receipt["new_tokens"] for receipt in receipts.values()}) > 1:
                raise SystemExit("the answers differ in length")
            for name, receipt in receipts.items():
                if run:
                    rates[name].append(receipt["decode_tps"])
    return rates


def chat_once(page: Page, address: str, client: Client) -> dict[str, Any]:
    """Send the prompt in a fresh page; the receipt of its answer."""
    page.goto(address)
    page.wait_for_selector("#message textarea", timeout=60_000)
    page.click("#more-options > button")
    page.locator("#option-greedy input").check()
    page.locator("#option-max_new_tokens input[type=number]").fill(str(NEW_TOKENS))
    page.locator("#option-max_new_tokens input[type=number]").blur()
    page.fill("#message textarea", PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("#message .stop-button")
    page.wait_for_selector("#message .submit-button", timeout=120_000)
    return client.predict(api_name="/receipt")


if __name__ == "__main__":
    main()
