"""Rate and size limits for visitors' requests, checked before anything of the page sees them.

Gradio bounds its queue and its uploads, but neither the rate of requests nor the size of a body, nor the
attempts at a password. Counts are held in memory, by address.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Rule:
    """At most `count` requests in `seconds` to a path that contains one of `paths`."""

    what: str
    paths: tuple[str, ...]
    count: int
    seconds: float


RULES = (
    Rule(msg("sign-ins"), ("/login",), 10, 300),
    Rule(msg("uploads"), ("/upload",), 20, 60),
    Rule(msg("actions"), ("/queue/join", "/call/", "/mcp"), 40, 60),
    Rule(msg("changes"), ("/run/", "/api/"), 600, 60),
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
            waits = [self._oldest(rule, address, rule.count), self._oldest(rule, "", rule.count * ALL_ADDRESSES)]
            if not any(waits):
                for key in ((rule.what, address), (rule.what, "")):
                    self._seen[key].append(self._now())
            if len(self._seen) > MOST_ADDRESSES:
                self._seen = {key: times for key, times in self._seen.items() if times}
            return max(waits)

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        rule = next((rule for rule in RULES if any(part in scope["path"] for part in rule.paths)), None)
        wait = self._counter.wait(rule, address_of(scope)) if rule else 0.0
        if rule and wait:
            sentence = msg(
                "Too many {what} from your address: {count} in {seconds:.0f} s. Try again in {wait:.0f} s.",
                what=rule.what,
                count=rule.count,
                seconds=rule.seconds,
                wait=wait,
            )
            await _refuse(send, 429, sentence, [(b"retry-after", b"%d" % (wait + 1))])
            return
        declared = _headers(scope).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MOST_BODY_BYTES:
            await _refuse(
                send,
                413,
                msg("A request may be at most {most_body_bytes}.", most_body_bytes=format_bytes(MOST_BODY_BYTES)),
            )
            return
        await self._app(scope, _bounded(receive), send)


def address_of(scope: Scope) -> str:
    """The client's address. uvicorn resolves this machine's own tunnel; behind a Space's proxy the header names it."""
    if settings().host in ("space", "zerogpu"):
        forwarded = _headers(scope).get(b"x-forwarded-for", b"").decode("latin-1")
        if forwarded:
            return forwarded.split(",")[0].strip()[:64]
    return (scope.get("client") or ("",))[0]


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


async def _refuse(send: Send, status: int, sentence: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    body = json.dumps({"detail": translate(sentence)}).encode()
    kind = (b"content-type", b"application/json")
    await send({"type": "http.response.start", "status": status, "headers": [kind, *(headers or [])]})
    await send({"type": "http.response.body", "body": body})
