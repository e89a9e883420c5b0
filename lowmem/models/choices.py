"""What a recommendation may choose from: models that can be had from here."""

from __future__ import annotations

import math
import time

import httpx

from lowmem.models.catalog import CATALOG
from lowmem.models.reference import DEMO
from lowmem.models.source import is_local
from lowmem.models.spec import ModelSpec
from lowmem.settings import settings

HUB_SECONDS = 2.0
AGAIN_SECONDS = 60.0

_ask_after: dict[str, float] = {}
"""Moments of the clock, by address: for ever where the hub has answered."""


def choices() -> list[ModelSpec]:
    """Chat models of the catalog that need no licence, best first; without the hub only local ones and the demo."""
    online = hub_reachable()
    entries = sorted((e for e in CATALOG if e.chat and not e.gated), key=lambda e: -e.quality)
    return [entry.spec() for entry in entries if online or entry.ref == DEMO or is_local(entry.ref)]


def hub_reachable() -> bool:
    """Does the hub answer? Asked once per process and address; after a while again where it did not."""
    return not settings().hub_offline and _answers(settings().hub_endpoint)


def _answers(endpoint: str) -> bool:
    if time.monotonic() > _ask_after.get(endpoint, 0.0):
        _ask_after[endpoint] = math.inf if _asked(endpoint) else time.monotonic() + AGAIN_SECONDS
    return _ask_after[endpoint] == math.inf


def _asked(endpoint: str) -> bool:
    try:
        httpx.head(endpoint, timeout=HUB_SECONDS)
    except (httpx.HTTPError, OSError):
        return False
    return True
