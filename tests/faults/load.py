"""Many visitors of one public page, as their browsers and programs talk to it: do all of them get their own answers?

    python -m tests.faults.load                                   # 32 visitors, 10 minutes, each with an address of its own
    python -m tests.faults.load --addresses one --minutes 1       # all behind one address

The page is `python app.py` in a process of its own, public because it listens on 127.0.0.2, behind a sign-in. Visitors
bind 127.0.1.1, 127.0.1.2, ...: nothing leaves this machine. Each plants a word of its own in all that it sends, and looks
for the words of the others in all that it gets. What it asks is decoded greedily, so that the same question must have the
same answer throughout, whoever else is served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from gradio_client.utils import apply_diff

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.2"
ACCOUNT = {"username": "guest", "password": "enter-all"}

MOST_SECONDS_TO_ANSWER = 2.0
MOST_SLOPE = 1e6
"""Bytes a minute by which the page may grow in the last half."""

SLOPE_SECONDS = 300
"""Shorter runs say nothing about growth: caches and pools of threads fill."""

LEAST_SHARE = 0.5
"""Of the median visitor's answers, for the one with the fewest."""

TICK_SECONDS = 2.0
"""An open page refreshes its sidebar this often."""

WORD = re.compile(r"zorv(\d+)ex")

Json = dict[str, Any]


class Wrong(Exception):
    """What must not happen."""


@dataclass
class Report:
    """What a run measured, and what was wrong."""

    seconds: float
    addresses: str
    visitors: int
    answers: list[int] = field(default_factory=list)
    acts: Counter[str] = field(default_factory=Counter)
    waited: int = 0
    probes: list[float] = field(default_factory=list)
    """Seconds in which the page answered."""
    cpu: float = 0.0
    """Cores that the page's process took."""
    machine: float = 0.0
    """Load average of the machine at the end: of this run and of whatever else runs."""
    slope: float = 0.0
    rss: tuple[int, int] = (0, 0)
    faults: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Add to `faults` what the figures say."""
        least, median = min(self.answers), statistics.median(self.answers)
        if least < LEAST_SHARE * median:
            self.faults.append(f"the slowest visitor has {least} answers, the median {median:.0f}: {self.answers}")
        if max(self.probes) > MOST_SECONDS_TO_ANSWER:
            late = sum(seconds > MOST_SECONDS_TO_ANSWER for seconds in self.probes)
            self.faults.append(f"the page took up to {max(self.probes):.1f} s to answer, {late} times over the limit")
        if self.seconds >= SLOPE_SECONDS and self.slope > MOST_SLOPE:
            self.faults.append(f"the page grew by {self.slope / 1e6:.2f} MB a minute in the last half")
        if not self.waited:
            self.faults.append("nobody was told a place in the queue")

    def __str__(self) -> str:
        acts = ", ".join(f"{count} {name}" for name, count in sorted(self.acts.items()))
        least, median = min(self.answers), statistics.median(self.answers)
        lines = [
            f"{self.visitors} visitors, {self.seconds / 60:.1f} minutes, {self.addresses} address(es): {acts}",
            f"answers: {sum(self.answers)}, of a visitor {least} to {max(self.answers)}, median {median:.0f}",
            f"{self.waited} actions were told their place; the page answered {len(self.probes)} probes in "
            f"{statistics.median(self.probes):.2f} s (median), {statistics.quantiles(self.probes, n=100)[-1]:.2f} s (99 %), "
            f"{max(self.probes):.2f} s at most; it took {self.cpu:.2f} cores, load average {self.machine:.1f}",
            f"page: {self.rss[0] / 1e6:.0f} MB at half time, {self.rss[1] / 1e6:.0f} MB at the end, "
            f"{self.slope / 1e6:+.2f} MB a minute",
            *(f"WRONG: {fault}" for fault in self.faults[:20]),
            *([f"and {len(self.faults) - 20} more"] if len(self.faults) > 20 else []),
        ]
        return "\n".join(lines)


# --- the page


@contextmanager
def served(home: Path, port: int, log: Path) -> Iterator[psutil.Process]:
    """`python app.py` as a public page; `home` is its LOWMEM_HOME, `log` gets what it prints."""
    account = ":".join(ACCOUNT.values())
    command = [sys.executable, "app.py", "--host", HOST, "--port", str(port), "--auth", account]
    environment = os.environ | {
        "LOWMEM_HOME": str(home),
        "GRADIO_TEMP_DIR": str(home / "uploads"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=printed)
    try:
        deadline = time.monotonic() + 90
        while not _answers(f"http://{HOST}:{port}"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Wrong(f"the page did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        if process.poll() is None:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def save_toy(models: Path) -> str:
    """Write a model of two small layers among the page's own; its reference."""
    folder = models / "toy"
    if not folder.exists():
        code = "import sys, toys; from pathlib import Path; toys.save_toy('llama', Path(sys.argv[1]))"
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        subprocess.run([sys.executable, "-c", code, str(folder)], env=os.environ | {"PYTHONPATH": path}, check=True)
    return str(folder)


class Layout:
    """The page's components and handlers, as a browser reads them from /config, and its endpoints."""

    def __init__(self, config: Json, info: Json) -> None:
        self.parameters = {name[1:]: one["parameters"] for name, one in info["named_endpoints"].items()}
        self.values = {one["id"]: _shown(one) for one in config["components"]}
        self.ids = {one["props"]["elem_id"]: one["id"] for one in config["components"] if one["props"].get("elem_id")}
        self.timers = [one["id"] for one in config["components"] if one["type"] == "timer"]
        self.handlers = {one["id"]: one for one in config["dependencies"]}

    def endpoint(self, name: str, **values: Any) -> tuple[Json, list[Any]]:
        """The handler of an endpoint and its inputs: `values`, the defaults of all others."""
        handler = next(one for one in self.handlers.values() if one["api_name"] == name)
        inputs = {one["parameter_name"]: one.get("parameter_default") for one in self.parameters[name]}
        return handler, list((inputs | values).values())

    def on(self, component: int, event: str) -> Json:
        """The handler of an event."""
        return next(one for one in self.handlers.values() if [component, event] in one["targets"])

    def after(self, handler: Json) -> Json:
        """The one that follows another."""
        return next(one for one in self.handlers.values() if one["trigger_after"] == handler["id"])

    def data(self, handler: Json, values: Json) -> list[Any]:
        """Inputs of a handler: what the page shows at first, and `values` by elem_id."""
        changed = {self.ids[name]: value for name, value in values.items()}
        return [changed.get(one, self.values[one]) for one in handler["inputs"]]


def _shown(component: Json) -> Any:
    """What a browser sends for a component that nobody has touched."""
    value = component["props"].get("value")
    return "" if value is None and component["type"] == "textbox" else value


# --- one visitor


class Visitor:
    """A browser, or a program: its address, sign-in, open page and word."""

    def __init__(self, number: int, url: str, address: str, model: str, report: Report) -> None:
        self.number, self.url, self.model, self.report = number, url, model, report
        self.word = f"zorv{number:04d}ex"
        transport = httpx.AsyncHTTPTransport(local_address=address, retries=2)
        self.http = httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(120), base_url=f"{url}/gradio_api/")
        self.layout = Layout({"components": [], "dependencies": []}, {"named_endpoints": {}})
        self.session, self.seen = "", [None, None]
        self.known: dict[str, str] = {}  # question -> its answer
        self.alive: asyncio.Task[None] | None = None
        self.answered = 0

    async def arrive(self) -> None:
        """Sign in, open the page."""
        answer = await self.http.post(f"{self.url}/login", data=ACCOUNT)
        self._looked_at(answer)
        config = await self.http.get(f"{self.url}/config")
        info = await self.http.get("info")
        self._looked_at(config)
        self._looked_at(info)
        self.layout = Layout(config.json(), info.json())
        await self.http.get(f"{self.url}/")
        self._open()

    def _open(self) -> None:
        self.session = secrets.token_hex(6)
        self.alive = asyncio.create_task(self._stay(self.session))

    async def _stay(self, session: str) -> None:
        """What an open page sends all the time: its heartbeat, and the refreshing of its sidebar."""
        async with self.http.stream("GET", f"heartbeat/{session}"):
            tick = self.layout.on(self.layout.timers[0], "tick")
            while True:
                await asyncio.sleep(TICK_SECONDS)
                await self._quick(tick, [None])

    async def leave(self) -> None:
        """Close the page."""
        if self.alive is not None:
            self.alive.cancel()
            with suppress(asyncio.CancelledError):
                await self.alive

    # --- what visitors do; each returns whether it got an answer

    async def chats(self) -> bool:
        """By the endpoint."""
        question = f"Tell me of {self.word}."
        last = await self.call("chat", message=question, options={"greedy": True, "max_new_tokens": 16})
        self._same(question, last["text"])
        if self.word not in json.dumps(last["receipt"]):
            raise Wrong("a receipt does not say what was asked")
        return True

    async def chats_on_the_page(self) -> bool:
        """In the message box."""
        async with self._asked(f"Say {self.word} twice.", 16) as frames:
            last = [frame async for frame in frames][-1]
        if self.word not in json.dumps(last):
            raise Wrong("the conversation has lost its question")
        return True

    async def plans(self) -> bool:
        context = 128 + 64 * (self.number % 4)
        plan = await self.call("plan", model=self.model, precision="fp32", context=context)
        if plan["context"] != context:
            raise Wrong("the plan is another one's")
        return False

    async def uploads(self) -> bool:
        """A file of prompts, answered as a batch; the results are downloaded."""
        name, content = f"{self.word}.txt", f"One {self.word}\nTwo {self.word}\n"
        answer = await self.http.post("upload", files={"files": (name, content.encode())})
        self._looked_at(answer)
        file = {"path": answer.json()[0], "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        click = self.layout.on(self.layout.ids["batch-start"], "click")
        values = {"option-max_new_tokens": 8, "prompt-file": file}
        await self._quick(click, [])
        run = self.layout.after(click)
        frames = [frame async for frame in self._run(run, self.layout.data(run, values))]
        table = next(json.dumps(one) for one in frames[-1] if self.word in json.dumps(one))
        if table.count(self.word) < 2:
            raise Wrong("a batch has lost a prompt")
        links = set(re.findall(r'"path": "([^"]+results\.csv)"', json.dumps(frames[-1])))
        for link in links:
            rows = await self.http.get(f"file={link}")
            self._looked_at(rows)
            if rows.text.count(self.word) < 2:
                raise Wrong("a file of results has lost a prompt")
        if not links:
            raise Wrong("a batch has no file of results")
        return True

    async def stops(self) -> bool:
        """In the middle of a long answer."""
        async with self._asked(f"Go on about {self.word}.", 400) as frames:
            async for frame in frames:
                if self.word in json.dumps(frame):
                    stop = self.layout.on(self.layout.ids["message"], "stop")
                    await self._quick(self.layout.after(stop), [])
                    break
            async for _ in frames:
                pass
        return False

    async def leaves(self) -> bool:
        """In the middle of a long answer, and comes back with a new page."""
        async with self._asked(f"Never mind {self.word}.", 400) as frames:
            async for frame in frames:
                if self.word in json.dumps(frame):
                    break
        await self.leave()
        self._open()
        return False

    CYCLE: tuple[Callable[[Visitor], Any], ...] = (
        chats,
        plans,
        chats_on_the_page,
        stops,
        chats,
        uploads,
        chats_on_the_page,
        leaves,
    )

    async def stays(self, until: float) -> None:
        """Do one thing after another."""
        step = self.number
        while time.monotonic() < until:
            act = self.CYCLE[step % len(self.CYCLE)]
            step += 1
            try:
                self.answered += await act(self)
                self.report.acts[act.__name__] += 1
            except (Wrong, httpx.HTTPError, KeyError, IndexError, StopIteration, ValueError) as error:
                self.report.faults.append(
                    f"visitor {self.number} {act.__name__}: {type(error).__name__}: {error}"[:400]
                )
            await asyncio.sleep(0.2)

    # --- how it is sent

    @asynccontextmanager
    async def _asked(self, question: str, tokens: int) -> AsyncIterator[AsyncIterator[list[Any]]]:
        """Send a message from the message box; closing the context closes the stream of the answer."""
        submit = self.layout.on(self.layout.ids["message"], "submit")
        await self._quick(submit, [question, []])
        run = self.layout.after(submit)
        history = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        frames = self._run(run, self.layout.data(run, {"chat": history, "option-max_new_tokens": tokens}))
        try:
            yield frames
        finally:
            await frames.aclose()

    async def call(self, name: str, **values: Any) -> Json:
        """An endpoint; its last answer.

        Raises:
            Wrong: the sentence instead of one.
        """
        frames = [frame async for frame in self._run(*self.layout.endpoint(name, **values))]
        return frames[-1][0]

    async def _quick(self, handler: Json, data: list[Any]) -> None:
        body = {"fn_index": handler["id"], "data": data, "session_hash": self.session}
        self._looked_at(await self.http.post("run/predict", json=body))

    async def _run(self, handler: Json, data: list[Any]) -> AsyncIterator[list[Any]]:
        """Outputs of a handler, frame by frame."""
        body = {"fn_index": handler["id"], "data": data, "session_hash": self.session, "event_data": None}
        joined = await self.http.post("queue/join", json=body)
        self._looked_at(joined)
        event, outputs, told = joined.json()["event_id"], [], False
        async with self.http.stream("GET", "queue/data", params={"session_hash": self.session}) as stream:
            async for line in stream.aiter_lines():
                if not line.startswith("data: "):
                    continue
                self._only_own(line)
                told = told or "Waiting: place " in line
                message = json.loads(line[6:])
                if message.get("event_id") not in (event, None):
                    raise Wrong("an event of another one")
                match message["msg"]:
                    case "process_generating":
                        outputs = _merged(outputs, message["output"]["data"])
                        yield outputs
                    case "process_completed":
                        self.report.waited += told
                        if not message["success"]:
                            raise Wrong(f"{message['output'].get('error')}")
                        outputs = message["output"].get("data") or outputs
                        self._no_notice(outputs)
                        yield outputs
                        return
                    case "unexpected_error":
                        raise Wrong(f"{message}")

    # --- what is looked for

    def _looked_at(self, answer: httpx.Response) -> None:
        self._only_own(answer.text)
        if answer.status_code != 200:
            raise Wrong(f"{answer.status_code} {answer.request.url.path}: {answer.text[:200]}")

    def _only_own(self, text: str) -> None:
        others = {int(number) for number in WORD.findall(text)} - {self.number}
        if others:
            raise Wrong(f"saw the words of visitors {sorted(others)}")

    def _no_notice(self, outputs: list[Any]) -> None:
        """Failures of the page's own handlers are shown, not raised."""
        for one in outputs:
            if 'role="alert"' in json.dumps(one).replace("\\", ""):
                raise Wrong(f"the page says: {one}")

    def _same(self, question: str, answer: str) -> None:
        if self.known.setdefault(question, answer) != answer:
            raise Wrong(f"{self.known[question]!r} became {answer!r}")


def _merged(before: list[Any], data: list[Any]) -> list[Any]:
    """The first frame is whole, later ones are differences."""
    if not before:
        return data
    return [apply_diff(old, new) if isinstance(new, list) else new for old, new in zip(before, data, strict=True)]


# --- the run


async def _probe(visitor: Visitor, until: float, report: Report) -> None:
    """Does the page answer, whatever else it does?"""
    while time.monotonic() < until:
        for ask in (lambda: visitor.http.get(f"{visitor.url}/"), lambda: visitor.call("machine")):
            started = time.monotonic()
            try:
                await ask()
            except (Wrong, httpx.HTTPError) as error:
                report.faults.append(f"probe: {type(error).__name__}: {error}")
            report.probes.append(time.monotonic() - started)
        await asyncio.sleep(1)


async def _measure(page: psutil.Process, until: float, sizes: list[tuple[float, int]]) -> None:
    while time.monotonic() < until:
        sizes.append((time.monotonic(), page.memory_info().rss))
        await asyncio.sleep(1)


async def _visit(url: str, page: psutil.Process, model: str, report: Report) -> None:
    def visitor(number: int) -> Visitor:
        last = 1 if report.addresses == "one" else 1 + number
        return Visitor(number, url, f"127.0.1.{last}", model, report)

    first, visitors = visitor(report.visitors), [visitor(number) for number in range(report.visitors)]
    await first.arrive()
    await first.call("load", model=model, precision="fp32", context=512)
    for one in visitors:
        await one.arrive()
    until, sizes, before = time.monotonic() + report.seconds, list[tuple[float, int]](), page.cpu_times()
    work = [one.stays(until) for one in visitors]
    await asyncio.gather(*work, _probe(first, until, report), _measure(page, until, sizes))
    after = page.cpu_times()
    report.cpu = (after.user + after.system - before.user - before.system) / report.seconds
    report.machine = psutil.getloadavg()[0]
    for one in (first, *visitors):
        await one.leave()
        await one.http.aclose()
    half = sizes[len(sizes) // 2 :]
    report.answers = [one.answered for one in visitors]
    report.slope = 60 * statistics.linear_regression(*zip(*half, strict=True)).slope
    report.rss = half[0][1], half[-1][1]
    report.check()


def run(visitors: int, seconds: float, addresses: str, home: Path, model: str = "toy") -> Report:
    """Serve a page and let visitors use it.

    Args:
        addresses: "one" for all visitors, or "many".
        home: the page's LOWMEM_HOME; what it printed is in its file page.log.
        model: "toy", or a reference of a model in `home`.
    """
    report = Report(seconds, addresses, visitors)
    home.mkdir(parents=True, exist_ok=True)
    reference = save_toy(home / "models") if model == "toy" else model
    port = _free_port()
    with served(home, port, home / "page.log") as page:
        asyncio.run(_visit(f"http://{HOST}:{port}", page, reference, report))
    printed = (home / "page.log").read_text()
    if "Traceback" in printed or "bug " in printed:
        report.faults.append(f"the page logged: {printed[-1500:]}")
    return report


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--addresses", choices=("one", "many"), default="many")
    parser.add_argument("--model", default="toy", help='"toy", or "demo" with --home where it is stored')
    parser.add_argument("--home", type=Path, help="LOWMEM_HOME of the page; a new folder by default")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = flags.home or Path(folder)
        report = run(flags.visitors, 60 * flags.minutes, flags.addresses, home, flags.model)
    print(report)
    return bool(report.faults)


if __name__ == "__main__":
    raise SystemExit(main())
