"""The models that a recommendation chooses from: those of the catalog that can be loaded here."""

from __future__ import annotations

import contextlib

from lowmem.errors import LowMemError
from lowmem.models import hub
from lowmem.models.catalog import Entry, recommended
from lowmem.models.reference import DEMO
from lowmem.models.source import is_local, read_spec
from lowmem.models.spec import ModelSpec


def choices() -> list[ModelSpec]:
    """Chat models that are not gated, best first. Without the hub: those on this machine, and the demo."""
    online = hub.reachable()
    return [_spec(entry, online) for entry in recommended() if online or entry.ref == DEMO or is_local(entry.ref)]


def _spec(entry: Entry, online: bool) -> ModelSpec:
    """From local files if there are any; the hub is not queried for each model of the catalog."""
    if not online or is_local(entry.ref):
        with contextlib.suppress(LowMemError):  # damaged files are reported when the model is loaded
            return read_spec(entry.ref)
    return entry.spec()
