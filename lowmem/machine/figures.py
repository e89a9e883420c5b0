"""Figures measured on this machine, saved as JSON files in LOWMEM_HOME.

A figure is the median of its last few measurements, so that one taken on a busy machine does not count.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
from contextlib import suppress

from lowmem.settings import settings

log = logging.getLogger("lowmem.machine")

LAST = 5
"""Measurements of a figure that are kept."""


def figures(name: str) -> dict[str, float]:
    """The figures in file `name`; empty if it is absent or damaged."""
    return {key: statistics.median_low(values) for key, values in _measurements(name).items()}


def save(name: str, key: str, value: float) -> None:
    """Replace the figure `key` in file `name`."""
    _write(name, _measurements(name) | {key: [value]})


def add(name: str, key: str, value: float, first: float) -> None:
    """Add a measurement of `key` to those before it, of which `first` is taken for the first one."""
    saved = _measurements(name)
    _write(name, saved | {key: [*saved.get(key, [first]), value][-LAST:]})


def _measurements(name: str) -> dict[str, list[float]]:
    try:
        saved = json.loads((settings().home / name).read_text()).items()
        values = ((str(key), value if isinstance(value, list) else [value]) for key, value in saved)
        return {key: list(map(float, value)) for key, value in values if value}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(name: str, measured: dict[str, list[float]]) -> None:
    """By atomic rename: two processes may measure at once."""
    path = settings().home / name
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(measured, indent=1))
        unfinished.replace(path)
    except OSError as error:
        log.warning("%s could not be saved: %s", name, error)
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
