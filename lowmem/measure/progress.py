"""Maps the progress of a part to the progress of the whole."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

from lowmem.events import Step, WithResult

T = TypeVar("T")


def share(events: Generator[Any, None, T], low: int, high: int) -> Generator[Step, None, T]:
    """Yield the steps of a part as per cent of the whole, from `low` to `high`, never decreasing; drop other events.

    The return value is that of `events`.
    """
    last = Step(low, 100, "", "%")
    running = WithResult(events)
    for event in running:
        if isinstance(event, Step):
            reached = low + (high - low) * event.done // event.total if event.total else low
            step = Step(max(reached, last.done), 100, event.note, "%")
            if step != last:
                yield step
            last = step
    return running.result
