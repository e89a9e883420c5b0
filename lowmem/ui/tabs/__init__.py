"""The tabs of the page, in their order. A new one is a file with a `TAB` of its own and a line here."""

from __future__ import annotations

from lowmem.ui.parts.context import Tab
from lowmem.ui.tabs import export, generate, longctx, offload, quantize

TABS: tuple[Tab, ...] = (generate.TAB, quantize.TAB, offload.TAB, longctx.TAB, export.TAB)
