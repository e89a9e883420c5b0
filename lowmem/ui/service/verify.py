"""Verification of the resident model for the page. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lowmem.events import CancelToken, Receipt, Step
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.results import new_folder

if TYPE_CHECKING:
    from lowmem.verify.claims import Claim

REPORT = "report.json"


class VerifyService:
    """Verification for one page's engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def verify(self, cancel: CancelToken, original: str = "") -> Iterator[Step | Claim | Receipt]:
        """Measure each claim about the resident model; the report is in the receipt's details and in details["file"].

        Raises:
            BadInput: nothing is loaded.
            NotAllowed: a visitor's set-up has a long context, or names a model that is not for visitors.
        """
        self.engine.require_model()
        plan = self.engine.resident
        assert plan is not None
        self.engine.access.check_reading(plan.context)
        if original:
            self.engine.spec(original)  # refuses models that this visitor may not name
        return self.engine.noted(self._events(cancel, original))

    def _events(self, cancel: CancelToken, original: str) -> Iterator[Step | Claim | Receipt]:
        from lowmem.verify.report import write_report
        from lowmem.verify.run import verify

        for event in verify(self.engine.session, original=original, cancel=cancel):
            if isinstance(event, Receipt):
                path = write_report(event.details, new_folder("verify") / REPORT)
                event.details["file"] = str(path)
            yield event
