"""Rates: how much of one kind of work this machine does per second.

A rate is measured once, with the very work that it predicts, and saved in LOWMEM_HOME for this processor and number of
threads. Long actions then correct their estimates by what they took: the median of the last few runs counts, so that one
run on a busy machine changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lowmem.machine import figures as saved_figures
from lowmem.machine import processor
from lowmem.settings import settings

log = logging.getLogger("lowmem.machine")

FIGURES = "rates.json"
CORRECTIONS = "corrections.json"

PROBE_SECONDS = 0.3
"""At least as long as an action is repeated to measure its rate; longer gives no steadier figure."""

LONG_SECONDS = 10.0
"""Shorter runs correct nothing: much of their time is not what was predicted."""


class Unmeasured(LookupError):
    """The rate was never measured on this machine, and the caller did not allow measuring it, or it cannot be measured."""


Again = bool | None
"""True measures again, False only what was never measured; None never measures and raises `Unmeasured`."""


def known_rate(work: str) -> float:
    """The rate of `work` on this machine.

    Raises:
        Unmeasured: it was never measured.
    """
    if found := _figures().get(_key(work)):
        return found
    raise Unmeasured(work)


def save_rate(work: str, measured: float) -> None:
    """Save the rate of `work` on this machine, in place of an earlier one."""
    saved_figures.save(FIGURES, _key(work), measured)


def learn_rate(work: str, measured: float) -> None:
    """Add a rate that a run of `work` showed to those before it."""
    saved_figures.add(FIGURES, _key(work), measured, first=measured)


def saved_rate(work: str, again: Again, measure: Callable[[], float]) -> float:
    """The rate of `work` on this machine, measured if it is missing or `again`.

    Raises:
        Unmeasured: see `Again`; or it cannot be measured.
    """
    if again is None:
        return known_rate(work)
    with suppress(Unmeasured):
        if not again:
            return known_rate(work)
    try:
        measured = measure()
    except OSError as error:
        log.warning("%s could not be measured: %s", work, error)
        raise Unmeasured(work) from error
    if measured:
        save_rate(work, measured)
    return measured


def rate(action: Callable[[], Any], amount: float) -> float:
    """`amount` per second of an action: the fastest of at least three runs within `PROBE_SECONDS`, after one to warm up.

    Other programs only ever slow a run down.
    """
    action()
    runs: list[float] = []
    end = time.perf_counter() + PROBE_SECONDS
    while len(runs) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        action()
        runs.append(time.perf_counter() - started)
    return amount / min(runs)


def correction(action: str) -> float:
    """What the last runs of `action` took, as a multiple of their uncorrected estimates; 1.0 before the first."""
    return saved_figures.figures(CORRECTIONS).get(_key(action), 1.0)


def learn(action: str, predicted: float, seconds: float) -> None:
    """Correct the estimates of `action` by a run that was `predicted`, correction included, and took `seconds`."""
    if predicted and seconds >= LONG_SECONDS:
        saved_figures.add(CORRECTIONS, _key(action), correction(action) * seconds / predicted, first=1.0)


def _key(work: str) -> str:
    # What torch will use. Rates are looked up on every move of a slider, long before torch is imported.
    threads = settings().threads or str(processor.cores())
    return f"{work}, {threads} threads of {processor.name()}"


def _figures() -> dict[str, float]:
    return saved_figures.figures(FIGURES)
