"""Rate and size limits for visitors' requests, checked before anything of the page sees them.

Gradio bounds its uploads, but neither the rate of requests nor the size of a body, nor the attempts at a password.
Counts are held in memory, by address. A class of 32 behind one address must get through, so they only bound a flood;
who works when is decided by `lane`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from lowmem.messages import msg, translate
from lowmem.settings import settings
from lowmem.units import MB, format_bytes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MOST_BODY_BYTES = 4 * MB
ALL_ADDRESSES = 10
"""All visitors together may send this many times the requests of one, so forging addresses gains little."""

MOST_ADDRESSES = 10_000

WRONG_PASSWORD = 400
"""Gradio's answer to it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `count` requests in `seconds` to a path that contains one of `paths`.

    Args:
        status: count only requests that are answered with this status.
    """

    what: str
    paths: tuple[str, ...]
    count: int
    seconds: float
    status: int = 0


RULES = (
    Rule(msg("wrong passwords"), ("/login",), 10, 300, WRONG_PASSWORD),
    Rule(msg("uploads"), ("/upload",), 100, 60),
    Rule(msg("actions"), ("/queue/join", "/call/", "/mcp"), 600, 60),
    Rule(msg("changes"), ("/run/", "/api/"), 3000, 60),  # every open page sends 30 a minute
)


class Counter:
    """Recent requests, by rule and address."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str], deque[float]] = {}

    def wait(self, rule: Rule, address: str) -> float:
        """Count one request; 0 when it may pass, else the seconds until one may."""
        with self._lock:
            wait = self._wait(rule, address)
            if not wait:
                self._count(rule, address)
            return wait

    def left(self, rule: Rule, address: str) -> float:
        """As `wait`, without counting."""
        with self._lock:
            return self._wait(rule, address)

    def count(self, rule: Rule, address: str) -> None:
        with self._lock:
            self._count(rule, address)

    def _wait(self, rule: Rule, address: str) -> float:
        return max(self._oldest(rule, address, rule.count), self._oldest(rule, "", rule.count * ALL_ADDRESSES))

    def _count(self, rule: Rule, address: str) -> None:
        for key in ((rule.what, address), (rule.what, "")):
            self._seen.setdefault(key, deque()).append(self._now())
        if len(self._seen) > MOST_ADDRESSES:
            self._seen = {key: times for key, times in self._seen.items() if times}

    def _oldest(self, rule: Rule, address: str, count: int) -> float:
        times = self._seen.setdefault((rule.what, address), deque())
        now = self._now()
        while times and now - times[0] >= rule.seconds:
            times.popleft()
        return times[0] + rule.seconds - now if len(times) >= count else 0.0


class VisitorLimits:
    """ASGI middleware: 429 for too many requests, 413 for a body that is too large, each with a sentence."""

    def __init__(self, app: Any) -> None:
        self._app, self._counter = app, Counter()
        self._one_by_one = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if "/mcp" in scope["path"]:
            scope = _forwarded(scope)
        declared = _headers(scope).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MOST_BODY_BYTES:
            sentence = msg("A request may be at most {most_body_bytes}.", most_body_bytes=format_bytes(MOST_BODY_BYTES))
            await _refuse(send, 413, sentence)
            return
        receive = _bounded(receive)
        rule = next((rule for rule in RULES if any(part in scope["path"] for part in rule.paths)), None)
        if rule is None:
            await self._app(scope, receive, send)
        elif rule.status:
            await self._tried(rule, scope, await _whole(receive), send)
        elif wait := self._counter.wait(rule, address_of(scope)):
            await _too_many(send, rule, wait)
        else:
            await self._app(scope, receive, send)

    async def _tried(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the request if it is answered with the rule's status: one by one, or many at once would all pass."""
        address = address_of(scope)

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message.get("status") == rule.status:
                self._counter.count(rule, address)
            await send(message)

        async with self._one_by_one:
            if wait := self._counter.left(rule, address):
                await _too_many(send, rule, wait)
            else:
                await self._app(scope, receive, counted)


async def _too_many(send: Send, rule: Rule, wait: float) -> None:
    sentence = msg(
        "Too many {what} from your address: {count} in {seconds:.0f} s. Try again in {wait:.0f} s.",
        what=rule.what,
        count=rule.count,
        seconds=rule.seconds,
        wait=wait,
    )
    await _refuse(send, 429, sentence, [(b"retry-after", b"%d" % (wait + 1))])


def address_of(scope: Scope) -> str:
    """The client's address. uvicorn resolves this machine's own tunnel; behind a Space's proxy the header names it."""
    if settings().host in ("space", "zerogpu"):
        forwarded = _headers(scope).get(b"x-forwarded-for", b"").decode("latin-1")
        if forwarded:
            return forwarded.split(",")[0].strip()[:64]
    return (scope.get("client") or ("",))[0]


def _forwarded(scope: Scope) -> Scope:
    """A request of MCP with its client's address in a header: gradio sends its headers on to this page, from this machine."""
    if settings().host in ("space", "zerogpu"):
        return scope
    others = [(name, value) for name, value in scope["headers"] if name != b"x-forwarded-for"]
    return {**scope, "headers": [*others, (b"x-forwarded-for", address_of(scope).encode())]}


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return dict(scope["headers"])


def _bounded(receive: Receive) -> Receive:
    """A body without a declared length ends where it becomes too large, as if its sender had left."""
    taken = 0

    async def read() -> MutableMapping[str, Any]:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= MOST_BODY_BYTES else {"type": "http.disconnect"}

    return read


async def _whole(receive: Receive) -> Receive:
    """Wait for the whole body; what is returned replays it."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    messages.reverse()

    async def replay() -> MutableMapping[str, Any]:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, status: int, sentence: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps({"detail": translate(sentence)}).encode()
    kind = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
