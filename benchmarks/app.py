"""The web app: seconds to its first page, and what its streaming costs the engine.

    python -m benchmarks.app [--runs 5]

Start: from `python app.py` to the page's answer, and to the Load button in a real browser.
Streaming: the engine's own decode speed on the command line against the same answer
streamed through the app to a browser that shows it, interleaved, medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from benchmarks.common import ROOT, lowmem, median, save, table

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    starts = [start_once() for _ in range(runs)]
    engine, app = stream(runs)
    ratio = median([a / e for a, e in zip(app, engine, strict=True)])
    rows: list[dict[str, Any]] = [
        {"figure": "seconds to the first page", "value": round(median([s[0] for s in starts]), 2)},
        {"figure": "seconds to the Load button in Chromium", "value": round(median([s[1] for s in starts]), 2)},
        {"figure": "torch loaded by then", "value": any(s[2] for s in starts)},
        {"figure": "decode tok/s, engine alone", "value": round(median(engine), 1)},
        {"figure": "decode tok/s, streamed to a browser", "value": round(median(app), 1)},
        {"figure": "streaming costs", "value": f"{1 - ratio:.1%}"},
    ]
    print(table(rows))
    save("app", rows, [f"median of {runs}; {NEW_TOKENS} new tokens, greedy, int8"])


@contextlib.contextmanager
def running_app() -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """`python app.py` on a free port: (address, process, when it was started)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.perf_counter()
    command = [sys.executable, "app.py", "--model", "demo", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT.parent, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}/", process, started
    finally:
        process.terminate()
        process.wait(20)


def wait_for(address: str, seconds: float = 60) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.02)
    raise SystemExit(f"no page from {address} within {seconds} s")


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


def stream(runs: int) -> tuple[list[float], list[float]]:
    """Decode tokens per second: engine alone, and in the app with a browser watching."""
    from gradio_client import Client

    engine, app = [], []
    options = {"max_new_tokens": NEW_TOKENS, "greedy": True}
    with sync_playwright() as play, running_app() as (address, _, _):
        wait_for(address)
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(address)
        client = Client(address, verbose=False)
        client.predict("demo", api_name="/load")
        for run in range(runs + 1):
            receipt = client.predict(PROMPT, options, api_name="/generate")["receipt"]
            alone = lowmem(
                "generate",
                "demo",
                "--prompt",
                PROMPT,
                "--greedy",
                "--max-new-tokens",
                NEW_TOKENS,
                "--precision",
                "int8",
            )
            if run:
                app.append(receipt["decode_tps"])
                engine.append(alone["decode_tps"])
        browser.close()
    return engine, app


if __name__ == "__main__":
    main()
