"""The tabs of the page, in their order. To add one, write a module with a `TAB`, import it here and add it to `TABS`."""

from __future__ import annotations

from lowmem.ui.parts.context import Tab
from lowmem.ui.tabs import export, generate, longctx, offload, quantize

TABS: tuple[Tab, ...] = (generate.TAB, quantize.TAB, offload.TAB, longctx.TAB, export.TAB)
