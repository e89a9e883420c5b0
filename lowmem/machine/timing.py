"""The time of long actions: estimated at measured rates before they run, and compared with what they took."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lowmem.errors import Cancelled, LowMemError
from lowmem.events import CancelToken, Receipt, Step
from lowmem.machine import rates
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.isolated import run_isolated
from lowmem.messages import msg
from lowmem.units import format_time_range

SMALLEST_TIMED = 20_000_000
"""Parameters of the smallest model for which a machine is measured; smaller ones take about as long as measuring."""

log = logging.getLogger("lowmem.machine")


def measured(
    estimate: Callable[[], float],
    job: str,
    arguments: Mapping[str, Any],
    cancel: CancelToken | None = None,
    budget: MemoryBudget = UNLIMITED,
) -> Generator[Step, None, float | None]:
    """The seconds that `estimate` returns; a child process runs `job` first, within `budget`, to measure missing rates.

    Returns:
        None if they cannot be measured, which is no reason not to run what is estimated.
    """
    try:
        return estimate()
    except rates.Unmeasured:
        yield Step(0, 0, msg("Measuring how fast this machine is"))
    try:
        for event in run_isolated(job, arguments, cancel, budget):
            if isinstance(event, Step):
                yield event
        return estimate()
    except Cancelled:
        raise
    except (LowMemError, RuntimeError, LookupError) as error:
        log.warning("the time could not be estimated: %s", error)
        return None


def timed(events: Iterable[Any], action: str, predicted: float | None) -> Iterator[Any]:
    """Pass on the events of an action whose time was `predicted`; its receipt gets that, and the next estimate is corrected."""
    if predicted and predicted >= rates.LONG_SECONDS:
        yield Step(0, 0, msg("Expected to take {range}", range=format_time_range(predicted)))
    for event in events:
        if isinstance(event, Receipt) and predicted and not event.details.get("resumed_blocks"):
            rates.learn(action, predicted, event.seconds)
            event = replace(event, predicted_seconds=predicted)
        yield event
