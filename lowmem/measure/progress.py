"""Progress of a part as progress of the whole it belongs to."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from lowmem.events import Step


def share(events: Iterator[Any], low: int, high: int) -> Generator[Step, None, Any]:
    """Steps of a part as per cent of a whole, from `low` to `high`, never going back; other events are dropped."""
    last = Step(low, 100, "", "%")
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        if isinstance(event, Step):
            reached = low + (high - low) * event.done // event.total if event.total else low
            step = Step(max(reached, last.done), 100, event.note, "%")
            if step != last:
                yield step
            last = step
