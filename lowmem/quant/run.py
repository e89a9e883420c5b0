"""Running a `QuantizeRequest`, in this process or in a child process. Imports no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

from lowmem.errors import file_errors, memory_errors
from lowmem.events import CancelToken, Receipt, Step, until_receipt
from lowmem.machine import timing
from lowmem.machine.hardware import probe
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.rates import Unmeasured
from lowmem.machine.timing import SMALLEST_TIMED, timed
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSpec
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.seconds import action, quantize_seconds


def quantize(request: QuantizeRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """Download the model if need be and quantize it in this process; the last event is the receipt.

    An unfinished run of the same request is continued. `request.out` appears once it is complete.

    Raises:
        LowMemError: see `models.fetch.fetch` and `pipeline.quantize_folder`.
    """
    with memory_errors(msg("{out} was not finished", out=request.out.name)):
        seconds = yield from measured(request, cancel)
        yield from timed(_quantize(request, cancel), action(request), seconds)


def measured(request: QuantizeRequest, cancel: CancelToken | None = None) -> Generator[Step, None, float | None]:
    """The estimated seconds, for which this machine is measured in a child process unless it was before.

    None for a small model, which takes about as long to quantize as to measure, and where measuring fails.
    """
    spec = read_spec(request.model, request.allow_paths)
    if spec.parameters < SMALLEST_TIMED:
        return None

    def estimate() -> float:
        return quantize_seconds(spec, request, device())

    return (yield from timing.measured(estimate, "measure_quantize", request.as_dict(), cancel, request.budget))


def known_seconds(spec: ModelSpec, request: QuantizeRequest) -> float | None:
    """The estimated seconds as far as this machine has been measured."""
    try:
        return quantize_seconds(spec, request, device())
    except Unmeasured:
        return None


def device() -> str:
    """Where this machine quantizes."""
    found = probe().device
    return found.key if found.kind == "cuda" else "cpu"


def _quantize(request: QuantizeRequest, cancel: CancelToken | None) -> Iterator[Step | Receipt]:
    from lowmem.models.fetch import fetch

    cancel = cancel or CancelToken()
    folder = yield from fetch(request.model, cancel, request.allow_paths)
    from lowmem.quant.pipeline import quantize_folder

    yield from quantize_folder(folder, request, cancel)


def quantize_isolated(request: QuantizeRequest, cancel: CancelToken | None = None) -> Iterator[Step | Receipt]:
    """The same in a child process, whose true peak of memory the receipt has."""
    with file_errors(msg("{out} was not begun", out=request.out.name)):
        request.out.parent.mkdir(parents=True, exist_ok=True)
    seconds = yield from measured(request, cancel)
    ran = run_isolated("quantize", request.as_dict(), cancel, request.budget)
    events = (event.receipt() if isinstance(event, Finished) else event for event in ran)
    yield from timed(events, action(request), seconds)


def job(**request: Any) -> Generator[Step, None, dict[str, Any]]:
    """The child of `quantize_isolated`: the receipt as a dict. Stop kills the process."""
    receipt = yield from until_receipt(_quantize(QuantizeRequest.from_dict(request), None))
    return receipt.as_dict()


def measure(**request: Any) -> Generator[Step, None, None]:
    """The job that measures the rates which the estimate of a request needs."""
    yield Step(0, 0, msg("Measuring how fast this machine is"))
    asked = QuantizeRequest.from_dict(request)
    quantize_seconds(read_spec(asked.model, asked.allow_paths), asked, device(), again=False)
