"""Figures measured on this machine, saved as JSON files in LOWMEM_HOME."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping

from lowmem.settings import settings

log = logging.getLogger("lowmem.machine")


def figures(name: str) -> dict[str, float]:
    """The figures in file `name`; empty if it is absent or damaged."""
    try:
        return {str(key): float(value) for key, value in json.loads((settings().home / name).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(name: str, measured: Mapping[str, float]) -> None:
    """Save the figures by atomic rename: two processes may measure at once."""
    path = settings().home / name
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(measured, indent=1))
        unfinished.replace(path)
    except OSError as error:
        log.warning("%s could not be saved: %s", name, error)
