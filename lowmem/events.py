"""Events of long actions: steps, text and, last, a receipt.

Every long action of the engine is a generator of these. It checks its `CancelToken` at least
once a second and raises `Cancelled` when the token is set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from lowmem.errors import Cancelled

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Step:
    """Progress: `done` of `total` units (`unit` "B" is bytes); a total of 0 is unknown."""

    done: int
    total: int
    note: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text added to one sequence since its last chunk, and the speed so far.

    `decode_tps` counts the tokens after the first; `finish` is None while the sequence
    goes on, else "eos", "length", "stop" (a stop string) or "cancelled".
    """

    text: str
    index: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    context_limit: int = 0
    seconds_to_first: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    finish: str | None = None

    @property
    def context_tokens(self) -> int:
        """Tokens of the context in use: prompt and answer."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer of a batch; `index` is the prompt's place, `sequence` its variant."""

    index: int
    prompt: str
    text: str
    sequence: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str = "eos"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an action cost: the last event of every action.

    `predicted` and `measured` are peak bytes by memory ("ram", "vram"); `notes` are
    sentences worth reading (a fallback, a limit reached); `snippet` is Python
    that repeats the action; `predicted_seconds` is 0 where no time was predicted; `details` holds numbers particular to the action.
    """

    action: str
    model: str
    precision: str
    device: str
    seconds: float
    predicted: dict[str, int] = field(default_factory=dict)
    measured: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds_to_first: float = 0.0
    prefill_tps: float = 0.0
    decode_tps: float = 0.0
    disk_bytes: int = 0
    notes: tuple[str, ...] = ()
    snippet: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    predicted_seconds: float = 0.0

    def error(self, memory: str) -> float | None:
        """Relative error of the prediction, (predicted - measured) / measured."""
        measured = self.measured.get(memory)
        if not measured or memory not in self.predicted:
            return None
        return (self.predicted[memory] - measured) / measured

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, bytes and seconds as plain numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Receipt:
        """The receipt that `as_dict` took apart."""
        return cls(**value | {"notes": tuple(value["notes"])})


class WithResult(Generic[T, R]):
    """Iterates over a generator; afterwards `result` is its return value."""

    result: R

    def __init__(self, events: Generator[T, None, R]) -> None:
        self._events = events

    def __iter__(self) -> Iterator[T]:
        self.result = yield from self._events


def drain(events: Generator[T, None, R], show: Callable[[T], object] = lambda _: None) -> R:
    """Run a generator to its end and return its return value; `show` is called with each event."""
    running = WithResult(events)
    for event in running:
        show(event)
    return running.result


def until_receipt(events: Iterator[T | Receipt]) -> Generator[T, None, Receipt]:
    """Pass on the events of an action; the return value is the receipt at its end."""
    for event in events:
        if isinstance(event, Receipt):
            return event
        yield event
    raise RuntimeError("an action ended without a receipt")


class CancelToken:
    """A Stop button for one piece of work: set once, from any thread."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise `Cancelled` once the token is set."""
        if self._event.is_set():
            raise Cancelled()

    def wait(self, seconds: float) -> None:
        """Sleep, but wake and raise `Cancelled` the moment the token is set."""
        if self._event.wait(seconds):
            raise Cancelled()
