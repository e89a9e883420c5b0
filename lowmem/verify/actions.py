"""What is measured where the model lives: actions for `Session.run` that yield steps and claims."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.datasets.texts import evaluation_text
from lowmem.errors import Cancelled, LowMemError, is_out_of_memory
from lowmem.events import CancelToken, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session
from lowmem.verify import claims
from lowmem.verify.claims import Claim, VerifyOptions

if TYPE_CHECKING:
    from lowmem.measure.windows import Passage
    from lowmem.runtime.loader import Loaded

log = logging.getLogger("lowmem.verify")

Measurement = Generator[Step | Claim, None, None]

WINDOW, STRIDE = 512, 256
"""Of the text that original and set-up score."""

RECALL_DISTANCE = 512
"""Most tokens between fact and question: six such texts are read."""

SPARE_TOKENS = 8
"""A decoded prompt may take a few more tokens when it is encoded again."""


def attempt(key: str, measurement: Measurement) -> Measurement:
    """Pass a measurement on; where it fails, its claims are not measured, with the reason."""
    try:
        yield from measurement
    except Cancelled:
        raise
    except LowMemError as error:
        yield claims.skipped(key, str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("memory ran out while verifying", exc_info=error)
        yield claims.skipped(key, msg("memory ran out."))


def measure(
    session: Session,
    reference: Path | None,
    options: VerifyOptions,
    decode_tps: float | None = None,
    *,
    cancel: CancelToken | None = None,
) -> Measurement:
    """Measure the resident model: an answer at the planned context, speed, quality and recall.

    Args:
        reference: file of the original's predictions for `passage_of`; None measures no divergence.
        decode_tps: predicted tokens per second.
    """
    cancel = cancel or CancelToken()
    yield from attempt("answer", _answer(session, options, cancel))
    yield from attempt("decode", _speed(session, options, decode_tps, cancel))
    if reference is not None:
        yield from attempt("kl", _divergence(session, reference, options, cancel))
    yield from attempt("recall", _recall(session, cancel))


def graph_folder(session: Session, *, cancel: CancelToken | None = None) -> Iterator[Step | Path]:
    """The folder of the resident graph, as the last event."""
    from lowmem.runtime.onnx import loader

    plan = session._resident()[1]
    assert plan.spec.source.folder is not None  # loaded
    yield (yield from loader.graph_folder(plan, plan.spec.source.folder, cancel or CancelToken(), plan.budget))


def passage_of(tokenizer: Any, context: int, options: VerifyOptions) -> Passage:
    """The text that original and set-up score, in windows that fit a context of `context` tokens."""
    from lowmem.measure.windows import passage

    window = min(WINDOW, context)
    stride = min(STRIDE, max(1, window // 2))
    return passage(tokenizer, evaluation_text().text, tokens=options.tokens, window=window, stride=stride)


def _cache(plan: Plan) -> dict[str, Any]:
    """The cache of a plan as generation options."""
    if plan.cache_type == "none":
        return {"use_cache": False}
    return {"cache_type": plan.cache_type, "prefill_chunk": plan.prefill_chunk}


def _prompt(session: Session, tokens: int) -> str:
    """English text of about `tokens` tokens."""
    from lowmem.generate.tokens import token_ids

    tokenizer, text = session._resident()[0].tokenizer, evaluation_text().text
    ids = token_ids(tokenizer, text, tokens)
    ids *= 1 + tokens // len(ids)
    return str(tokenizer.decode(ids[:tokens], skip_special_tokens=False))


def _answer(session: Session, options: VerifyOptions, cancel: CancelToken) -> Measurement:
    """The peak of an answer that fills the planned context."""
    plan = session._resident()[1]
    new_tokens = max(1, min(options.new_tokens, plan.context // 4))
    prompt = _prompt(session, max(1, plan.context - new_tokens - SPARE_TOKENS))
    chosen = GenerateOptions(max_new_tokens=new_tokens, greedy=True, unbounded=True, **_cache(plan))
    yield Step(0, 0, msg("Answering with a full context of {context:,} tokens", context=plan.context))
    for event in session.generate(prompt, chosen, cancel, raw=True):
        if isinstance(event, Receipt):
            cancel.check()  # an answer that is stopped does not raise
            yield from claims.peaks("answer", event)


def _speed(session: Session, options: VerifyOptions, decode_tps: float | None, cancel: CancelToken) -> Measurement:
    from lowmem.measure.speed import measure_speed

    plan = session._resident()[1]
    new_tokens = max(2, min(options.new_tokens, plan.context // 4))
    prompt = _prompt(session, max(1, min(options.prompt_tokens, plan.context - new_tokens - SPARE_TOKENS)))
    found = yield from measure_speed(session, prompt, new_tokens=new_tokens, runs=options.runs, cancel=cancel)
    yield claims.speed("prefill", found.prefill_tps, None)
    yield claims.speed("decode", found.decode_tps, decode_tps)


def _divergence(session: Session, reference: Path, options: VerifyOptions, cancel: CancelToken) -> Measurement:
    def job(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step, None, Claim]:
        from lowmem.measure.divergence import divergence

        read = passage_of(loaded.tokenizer, plan.spec.context, options)
        _, compared = yield from divergence(loaded.model, read, reference, cancel=cancel, check=check)
        return claims.divergence(compared.mean, compared.agreement, compared.tokens, claims.kl_limit(plan))

    claim, _ = yield from session.work(msg("Comparing with the original"), job, cancel, layers=False)
    yield claim


def _recall(session: Session, cancel: CancelToken) -> Measurement:
    from lowmem.longctx import needle

    plan = session._resident()[1]
    distance = min(RECALL_DISTANCE, plan.context - needle.OVERHEAD_TOKENS)
    if distance < 1:
        yield claims.skipped("recall", msg("a context of {context:,} tokens is too short.", context=plan.context))
        return

    def job(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step, None, needle.Recall]:
        from lowmem.generate.tokens import token_ids

        yield Step(0, 0, msg("Asking for a fact {distance:,} tokens back", distance=distance))
        filler = token_ids(loaded.tokenizer, evaluation_text().text, distance)
        chosen = GenerateOptions(**_cache(plan))
        return needle.recall(loaded.model, loaded.tokenizer, filler, chosen, distance, cancel=cancel, check=check)

    found, _ = yield from session.work(msg("Testing recall"), job, cancel, layers=False)
    yield claims.recalled(found.distance, found.probability, found.recalled)
