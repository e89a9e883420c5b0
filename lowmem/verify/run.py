"""Verification of a set-up: every claim that lowmem makes of it, measured on this machine. Imports no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, LowMemError
from lowmem.events import CancelToken, Receipt, Step, until_receipt
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.machine.rates import Unmeasured
from lowmem.measure.compare import workspace
from lowmem.messages import msg
from lowmem.models.model_files import MANIFEST
from lowmem.models.source import local_folder
from lowmem.offload.estimate import estimate_speed, largest_file
from lowmem.planning.plan import Plan
from lowmem.planning.seconds import learn_by_size, or_zero, seconds_by_size
from lowmem.runtime.onnx.manifest import read_manifest
from lowmem.runtime.session import Session
from lowmem.verify import actions, claims
from lowmem.verify.claims import FAILED, PASSED, SKIPPED, Claim, VerifyOptions
from lowmem.verify.report import report

log = logging.getLogger("lowmem.verify")

DEFAULT_OPTIONS = VerifyOptions()

NO_ORIGINAL = msg("the original is not on this machine; name it to compare with it.")


def verify(
    session: Session,
    plan: Plan | None = None,
    options: VerifyOptions = DEFAULT_OPTIONS,
    *,
    original: str = "",
    cancel: CancelToken | None = None,
) -> Iterator[Step | Claim | Receipt]:
    """Measure each claim about a set-up; the receipt's `details` are the report.

    Args:
        plan: is loaded first; None for the resident model, whose loading was measured when it was loaded.
        original: reference of the model that was quantized or exported, where the set-up does not say.

    Raises:
        LowMemError: loading failed, or `original` names no model.
        Cancelled: the model stays loaded.
    """
    cancel, started = cancel or CancelToken(), time.perf_counter()
    if plan is not None:
        yield from until_receipt(session.load(plan, cancel))
    resident, loaded = session.plan, session.load_receipt
    if resident is None or loaded is None:
        raise BadInput(msg("No model is loaded."), msg("Load one first."))
    found: list[Claim] = []
    for event in _measure(session, resident, loaded, options, original, cancel):
        if isinstance(event, Claim):
            found.append(event)
        yield event
    for claim in claims.fits(found, resident.budget):
        found.append(claim)
        yield claim
    seconds = time.perf_counter() - started
    expected = or_zero(seconds_by_size, resident, "verifying")
    learn_by_size(resident, "verifying", seconds)
    yield replace(_receipt(resident, found, seconds), predicted_seconds=expected)


def _measure(
    session: Session, plan: Plan, loaded: Receipt, options: VerifyOptions, original: str, cancel: CancelToken
) -> actions.Measurement:
    yield from claims.peaks("load", loaded)
    folder = original_of(plan, original)
    with workspace() as work:
        reference: Path | None = None
        if isinstance(folder, str):
            yield claims.skipped("kl", folder)
        else:
            if plan.backend == "onnx":
                yield from actions.attempt("parity", _parity(session, plan, folder, cancel))
            reference = work / "reference.bin"
            yield from actions.attempt("kl", _write_reference(plan, folder, reference, options, cancel))
            reference = reference if reference.is_file() else None
        yield from session.run(actions.measure, reference, options, _predicted_tps(plan), cancel=cancel)


def original_of(plan: Plan, named: str = "") -> Path | str:
    """The folder of the model that a plan's weights were made from, or the reason why there is nothing to compare."""
    if named:
        return local_folder(named) or NO_ORIGINAL
    folder = plan.spec.source.folder
    if folder is None:
        return NO_ORIGINAL
    if (folder / MANIFEST).is_file():
        try:
            return local_folder(read_manifest(folder).source) or NO_ORIGINAL
        except LowMemError:
            return NO_ORIGINAL
    if plan.precision == "stored" and plan.backend == "torch":
        return NO_ORIGINAL
    if plan.precision == "fp32" and plan.backend == "torch":
        return msg("in fp32 the original itself runs.")
    return folder


def _write_reference(
    plan: Plan, folder: Path, out: Path, options: VerifyOptions, cancel: CancelToken
) -> actions.Measurement:
    """Write the predictions of the model in `folder` to the file `out`."""
    arguments = {"folder": str(folder), "out": str(out), "context": plan.spec.context, "options": asdict(options)}
    yield from _value_of("write_reference", arguments, plan, cancel)


def _parity(session: Session, plan: Plan, folder: Path, cancel: CancelToken) -> actions.Measurement:
    """Check the resident graph against the model in `folder`."""
    graph: Path | None = None
    for event in session.run(actions.graph_folder, cancel=cancel):
        if isinstance(event, Path):
            graph = event
        else:
            yield event
    arguments = {"folder": str(folder), "graph": str(graph)}
    checked = yield from _value_of("check_parity", arguments, plan, cancel)
    yield Claim("parity", PASSED if checked["passed"] else FAILED, checked["sentence"])


def _value_of(job: str, arguments: dict[str, Any], plan: Plan, cancel: CancelToken) -> Generator[Step, None, Any]:
    """Run a job on the original within what the budget leaves; returns its value."""
    for event in run_isolated(job, arguments, cancel, plan.budget.for_child_process()):
        if isinstance(event, Finished):
            return event.value
        yield event
    raise RuntimeError("a job ended without a result")


def _predicted_tps(plan: Plan) -> float | None:
    """Tokens per second that the Offload tab shows for a plan, None where it shows none."""
    folder = plan.spec.source.folder
    file = largest_file(folder) if folder and plan.placement else None
    if file is None:
        return None
    try:
        return plan.batch / estimate_speed(plan, file, None).seconds_per_token
    except (Unmeasured, ZeroDivisionError):
        return None


def _receipt(plan: Plan, found: list[Claim], seconds: float) -> Receipt:
    answers = [claim for claim in found if claim.key == "answer" and claim.verdict != SKIPPED]
    speeds = {claim.key: claim.measured or 0.0 for claim in found if claim.unit == "tokens/s"}
    return Receipt(
        action="verify",
        model=plan.spec.name,
        precision=plan.precision,
        device=plan.device,
        seconds=seconds,
        predicted={claim.memory: int(claim.predicted or 0) for claim in answers},
        measured={claim.memory: int(claim.measured or 0) for claim in answers},
        prefill_tps=speeds.get("prefill", 0.0),
        decode_tps=speeds.get("decode", 0.0),
        notes=tuple(claim.sentence for claim in found if claim.verdict == FAILED),
        details=report(plan, found, seconds),
    )
