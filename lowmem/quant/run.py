"""Running a `QuantizeRequest`, in this process or in a child process. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from lowmem.events import CancelToken, Receipt, Step, until_receipt
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.quant.request import QuantizeRequest


def quantize(request: QuantizeRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """Download the model if need be and quantize it in this process; the last event is the receipt.

    An unfinished run of the same request is continued. `request.out` appears once it is complete.

    Raises:
        LowMemError: see `models.fetch.fetch` and `pipeline.quantize_folder`.
    """
    from lowmem.models.fetch import fetch

    cancel = cancel or CancelToken()
    folder = yield from fetch(request.model, cancel, request.allow_paths)
    from lowmem.quant.pipeline import quantize_folder

    yield from quantize_folder(folder, request, cancel)


def quantize_isolated(request: QuantizeRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """The same in a child process, whose true peak of memory the receipt has."""
    request.out.parent.mkdir(parents=True, exist_ok=True)
    for event in run_isolated("quantize", request.as_dict(), cancel, request.budget):
        yield event.receipt() if isinstance(event, Finished) else event


def job(**request: Any) -> Generator[Step, None, dict[str, Any]]:
    """The child of `quantize_isolated`: the receipt as a dict. Stop kills the process."""
    receipt = yield from until_receipt(quantize(QuantizeRequest.from_dict(request)))
    return receipt.as_dict()
