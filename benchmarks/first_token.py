"""From a bare machine to the first token, and how long each part takes: python -m benchmarks.first_token

Runs the README's first command in a copy of this checkout with a virtual environment, caches and a home of its own, and
presses Load and Send through the app's endpoints. What pip fetches comes from wherever this machine's pip looks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import free_port, save, table

ROOT = Path(__file__).parents[1]
NOTES = [
    "One run of the first command above, without caches, while other programs worked on the same two cores; torch's wheel "
    "came from this disk, everything else from the package index."
]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "screenshots")


def command() -> tuple[str, str]:
    """The README's first command: what installs, and what starts the app."""
    line = next(
        line.strip()
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if "&& python app.py" in line
    )
    install, _, start = line.rpartition(" && ")
    return install, start


def first_token(scratch: Path) -> list[dict[str, Any]]:
    """Seconds of each part, one after the other, and of all of them."""
    copy, venv = scratch / "lowmem", scratch / "venv"
    shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
    port = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LOWMEM", "VIRTUAL"))}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "LOWMEM_HOME": str(scratch / "home"), "PIP_NO_CACHE_DIR": "1"}
    install, start = command()
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def passed(what: str) -> None:
        seconds[what] = round(time.perf_counter() - began - sum(seconds.values()), 1)

    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    passed("virtual environment")
    subprocess.run(install, shell=True, check=True, cwd=copy, env=env, stdout=subprocess.DEVNULL)
    passed("installing")
    app = subprocess.Popen(f"exec {start} --port {port}", shell=True, cwd=copy, env=env, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            if app.poll() is not None:
                raise SystemExit("The app ended before it answered.")
            time.sleep(0.1)
        passed("first page")
        from gradio_client import Client

        client = Client(url, verbose=False)
        client.predict("demo", api_name="/load")
        passed("fetching and loading the demo model")
        next(iter(client.submit("What is a KV cache?", api_name="/chat")))
        passed("first token")
    finally:
        app.terminate()
        app.wait()
    seconds["all of it"] = round(sum(seconds.values()), 1)
    return [{"from a bare machine": what, "seconds": spent} for what, spent in seconds.items()]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lowmem-bare-") as scratch:
        rows = first_token(Path(scratch))
    save("first_token", rows, NOTES)
    print(table(rows))


if __name__ == "__main__":
    main()
