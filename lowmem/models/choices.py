"""The models that a recommendation chooses from: those of the catalog that can be loaded here."""

from __future__ import annotations

import contextlib

from lowmem.errors import LowMemError
from lowmem.messages import msg
from lowmem.models import hub
from lowmem.models.catalog import Entry, recommended
from lowmem.models.reference import DEMO
from lowmem.models.source import is_local, read_spec
from lowmem.models.spec import ModelSpec
from lowmem.settings import settings


def choices() -> list[ModelSpec]:
    """Chat models that are not gated, best first. Without the hub: those on this machine, and the demo."""
    online = hub.reachable()
    return [_spec(entry, online) for entry in recommended() if online or entry.ref == DEMO or is_local(entry.ref)]


def shortage() -> str:
    """Why `choices` leaves out models of the catalog, with those that are left; "" when it does not."""
    if hub.reachable():
        return ""
    names = ", ".join(spec.name for spec in choices())
    if settings().hub_offline:
        return msg("The hub is switched off (HF_HUB_OFFLINE), so the choice is among {names}.", names=names)
    return msg("The hub cannot be reached, so the choice is among {names}.", names=names)


def _spec(entry: Entry, online: bool) -> ModelSpec:
    """From local files if there are any; the hub is not queried for each model of the catalog."""
    if not online or is_local(entry.ref):
        with contextlib.suppress(LowMemError):  # damaged files are reported when the model is loaded
            return read_spec(entry.ref)
    return entry.spec()
