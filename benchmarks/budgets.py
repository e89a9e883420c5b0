"""The budget as a promise: actions of the app under random budgets, and the most memory that its processes held.

    python -m benchmarks.budgets [--cases 20] [--seed 1]

The page runs as `python app.py`; every case is a call of one of its endpoints with a budget between half and 1.6 times
of what the action needs by its own estimate. The peak is the resident set of the page and all of its descendants,
sampled 200 times a second. A budget below the need is refused, or a fallback runs in it; either way the peak stays
below the budget, and the page answers afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
from gradio_client import Client

from benchmarks.app import running_app
from benchmarks.common import demo_folder, english, save, table, text_of
from lowmem.units import MB, format_bytes

SAMPLE_SECONDS = 0.005
TEXT_TOKENS = 6000
OPTIONS = {"max_new_tokens": 32, "greedy": True}


class Watch:
    """The most RAM that a process and its descendants held together since `start`."""

    def __init__(self, pid: int) -> None:
        self._page = psutil.Process(pid)
        self._command = self._page.cmdline()
        self._processes: list[psutil.Process] = []
        self._peak = 0
        threading.Thread(target=self._run, daemon=True).start()

    def start(self) -> None:
        self._peak = 0

    @property
    def peak(self) -> int:
        return self._peak

    def now(self) -> int:
        total = 0
        for process in self._processes:
            with suppress(psutil.Error):  # it has just ended
                total += process.memory_info().rss
        return total

    def _run(self) -> None:
        for turn in itertools.count():
            try:
                if turn % 10 == 0:
                    self._processes = [self._page, *filter(self._has_begun, self._page.children(recursive=True))]
            except psutil.Error:
                return
            self._peak = max(self._peak, self.now())
            time.sleep(SAMPLE_SECONDS)

    def _has_begun(self, child: psutil.Process) -> bool:
        """Whether it has memory of its own: until exec, a child's is that of its parent."""
        with suppress(psutil.Error):
            return child.cmdline() != self._command
        return False


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with running_app() as (url, process, _):
        wait(url)
        client, watch = Client(url, verbose=False), Watch(process.pid)
        draw = random.Random(args.seed)
        for number in range(args.cases):
            name = list(ACTIONS)[number % len(ACTIONS)]
            rows.append(case(client, watch, name, draw.uniform(0.5, 1.6)) | {"page": answers(url)})
            print(table([shown(rows[-1])]).splitlines()[-1], flush=True)
    print("\n" + table([shown(row) for row in rows]))
    worst = max(row["peak"] / row["budget"] for row in rows)
    note = f"largest peak {worst:.1%} of its budget; the page answered after {sum(row['page'] for row in rows)} of {len(rows)}"
    print(f"\n{note}")
    save("budgets", rows, [note, f"seed {args.seed}"])


def case(client: Client, watch: Watch, name: str, share: float) -> dict[str, Any]:
    """One action under `share` of the bytes that it needs."""
    need, run = ACTIONS[name]
    client.predict(api_name="/unload")
    held = watch.now()
    needed = need(client, held)
    budget = max(300 * MB, int(share * needed))
    watch.start()
    try:
        run(client, f"{budget}")
        outcome = "done"
    except Exception as error:  # gradio's, with the sentence
        outcome = str(error)[:200]
    return {"action": name, "needed": needed, "budget": budget, "peak": watch.peak, "outcome": outcome}


def load(client: Client, ram: str, precision: str = "int8", context: int = 2048) -> None:
    client.predict("demo", precision=precision, context=context, ram=ram, api_name="/load")


def planned(client: Client, precision: str = "int8", context: int = 2048) -> int:
    plan = client.predict("demo", precision=precision, context=context, api_name="/plan")
    return int(plan["budgets"]["ram"]["peak"])


def generate(client: Client, ram: str) -> None:
    load(client, ram, "fp32")
    client.predict(text_of(demo_folder(), 1900), OPTIONS, api_name="/generate")


def batch(client: Client, ram: str) -> None:
    load(client, ram)
    client.predict([text_of(demo_folder(), 400)] * 16, OPTIONS, batch_size=16, api_name="/batch")


def hidden(client: Client, ram: str) -> None:
    load(client, ram)
    client.predict(english(TEXT_TOKENS), window=1024, stride=512, api_name="/hidden_states")


def quantize(client: Client, ram: str) -> None:
    client.predict("demo", method="rtn", ram=ram, api_name="/quantize")


def export(client: Client, ram: str) -> None:
    client.predict("demo", precision="int4", ram=ram, api_name="/export")


ACTIONS: dict[str, tuple[Callable[[Client, int], int], Callable[[Client, str], None]]] = {
    "load": (lambda client, _: planned(client), load),
    "generate": (lambda client, _: planned(client, "fp32"), generate),
    "batch of 16": (lambda client, _: planned(client) + 400 * MB, batch),
    "hidden states": (lambda client, _: planned(client) + 60 * MB, hidden),
    "quantize": (lambda _, held: held + 480 * MB, quantize),
    "export": (lambda _, held: held + 940 * MB, export),
}
"""Action -> about what it needs with everything that is held already, and the calls."""


def wait(url: str) -> None:
    while not answers(url):
        time.sleep(0.2)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as page:
            return bool(page.status == 200)
    except OSError:
        return False


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "action": row["action"],
        "needs about": format_bytes(row["needed"]),
        "budget": format_bytes(row["budget"]),
        "peak": format_bytes(row["peak"]),
        "of the budget": f"{row['peak'] / row['budget']:.0%}",
        "outcome": row["outcome"] if row["outcome"] == "done" else "refused: " + row["outcome"][:110],
    }


if __name__ == "__main__":
    main()
