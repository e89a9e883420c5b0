"""All services of a page."""

from __future__ import annotations

from lowmem.ui.service.compare import CompareService
from lowmem.ui.service.described import DescribedService
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.export import ExportService
from lowmem.ui.service.longctx import LongContextService
from lowmem.ui.service.offload import OffloadService
from lowmem.ui.service.quantize import QuantizeService
from lowmem.ui.service.verify import VerifyService


class Services:
    """The services over one engine; arguments replace the default ones.

    Attributes:
        engine, described, quantize, compare, offload, longctx, export, verify: one service each.
    """

    def __init__(
        self, engine: Engine, *, quantize: QuantizeService | None = None, compare: CompareService | None = None
    ) -> None:
        self.engine = engine
        self.described = DescribedService(engine)
        self.quantize = quantize or QuantizeService(engine)
        self.compare = compare or CompareService(engine)
        self.offload = OffloadService(engine)
        self.longctx = LongContextService(engine)
        self.export = ExportService(engine)
        self.verify = VerifyService(engine)
