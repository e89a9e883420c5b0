"""Tokens per second of the loaded model, from its receipts."""

from __future__ import annotations

import statistics
from collections.abc import Generator
from dataclasses import dataclass

from lowmem.events import CancelToken, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.runtime.session import Session


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians of `runs` runs; `decode_tps` is 0 if the model ended its answer with the first token."""

    prefill_tps: float
    decode_tps: float
    prompt_tokens: int
    new_tokens: int
    runs: int


def measure_speed(
    session: Session, prompt: str, *, new_tokens: int = 32, runs: int = 3, cancel: CancelToken | None = None
) -> Generator[Step, None, Speed]:
    """Continue `prompt` greedily `runs` times; the return value of the generator is the `Speed`.

    Raises:
        BadInput, DoesNotFit, OutOfMemory, CorruptModel, Cancelled: see `Session.generate`.
    """
    cancel = cancel or CancelToken()
    options = GenerateOptions(max_new_tokens=new_tokens, greedy=True)
    receipts: list[Receipt] = []
    for run in range(runs):
        yield Step(run, runs, msg("Measuring speed, run {run} of {runs}", run=run + 1, runs=runs), "runs")
        for event in session.generate(prompt, options, cancel, raw=True):
            if isinstance(event, Receipt):
                receipts.append(event)
        cancel.check()  # generation that is stopped after its first token does not raise
    yield Step(runs, runs, msg("Speed measured"), "runs")
    return Speed(
        prefill_tps=statistics.median(receipt.prefill_tps for receipt in receipts),
        decode_tps=statistics.median(receipt.decode_tps for receipt in receipts),
        prompt_tokens=receipts[0].prompt_tokens,
        new_tokens=receipts[0].new_tokens,
        runs=runs,
    )
