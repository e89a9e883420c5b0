"""Actions of the resident model on a long text: hidden states, perplexity and recall. Each ends in a receipt.

Imports torch only when an action runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lowmem.datasets.texts import CHARACTERS_PER_TOKEN
from lowmem.errors import BadInput
from lowmem.events import CancelToken, Receipt, Step
from lowmem.fields import arguments, changed, literal
from lowmem.generate.options import GenerateOptions
from lowmem.generate.tokens import token_ids
from lowmem.generate.window_limits import check_stride, check_token_window, check_window
from lowmem.longctx.curve import MIN_SPAN, Span, perplexity
from lowmem.longctx.estimates import pass_plan, refuse_if_over, streaming_plan, window_plan
from lowmem.longctx.options import ReadingLimit
from lowmem.measure.options import LOGITS_BYTES, LOGITS_COPIES
from lowmem.measure.windows import cut, tokens_read
from lowmem.messages import msg
from lowmem.planning.plan import Plan
from lowmem.planning.seconds import Work, learn_reading, or_zero, reading_seconds
from lowmem.runtime.receipts import load_snippet
from lowmem.runtime.session import Session

if TYPE_CHECKING:
    from lowmem.longctx.needle import Recall
    from lowmem.runtime.loader import Loaded

CURVE_POINTS = 60

RECALL_DISTANCE = 2048
"""Tokens between fact and question when there is no window."""


class _Read(NamedTuple):
    """What `reading_seconds` are asked for."""

    tokens: int
    window: int
    work: Work


def hidden_states(
    session: Session,
    text: str,
    window: int,
    stride: int,
    out: Path,
    *,
    layers: Sequence[int] = (-1,),
    tokens: int | None = None,
    cancel: CancelToken | None = None,
    force: bool = False,
    limit: ReadingLimit | None = None,
) -> Iterator[Step | Receipt]:
    """Write the hidden states of `text` to the file `out`, see `longctx.hidden.hidden_states`.

    Args:
        window, stride: of the sliding windows, in tokens.
        layers: 0 for the embeddings, i for the output of block i, negative ones from the end.
        tokens: use only this many tokens of the text, as in all actions here.
        force: run even if the estimate exceeds the budget.
        limit: of the work's size, as in all actions here.

    Raises:
        BadInput, DoesNotFit, NotAllowed, DiskFull, CorruptModel, Cancelled.
    """
    cancel = cancel or CancelToken()

    def task(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step, None, tuple[Plan, Any]]:
        from lowmem.longctx import hidden

        ids = tokens_of(loaded.tokenizer, text, tokens)
        check_token_window(window, plan.spec.context)
        if limit:
            limit.check_tokens(tokens_read(cut(len(ids), window, stride)))
        action = window_plan(plan, window, len(ids))
        refuse_if_over(action, force, msg("Use a shorter window."))
        written = yield from hidden.hidden_states(
            loaded.model, [ids], window, stride, out,
            layers=layers, at_once=action.context, cancel=cancel, check=check, limit=limit,
        )  # fmt: skip
        return action, (written, len(ids))

    check_stride(window, stride)
    started = time.perf_counter()
    (action, (written, count)), peak = yield from session.work(
        msg("Computing hidden states"), task, cancel, force=force
    )
    details = {**asdict(written), "window": window, "stride": stride, "file": str(out)}
    del details["path"]
    repeat = _call(
        session,
        "hidden_states",
        text,
        {"window": window, "stride": stride},
        out="Path('hidden.npy')",
        layers=repr(tuple(layers)),
        tokens=repr(tokens),
        force=repr(force),
    )
    note = msg(
        "{windows:,} windows; every state has at least {difference:,} tokens of context, or all of the text before it.",
        windows=written.windows,
        difference=window - stride,
    )
    read = _Read(tokens_read(cut(count, window, stride)), window, "reading")
    yield _receipt("hidden", action, started, peak, count, details, (note,), out.stat().st_size, repeat, read)


def sliding_perplexity(
    session: Session,
    text: str,
    window: int,
    stride: int,
    *,
    tokens: int | None = None,
    cancel: CancelToken | None = None,
    force: bool = False,
    limit: ReadingLimit | None = None,
) -> Iterator[Step | Span | Receipt]:
    """Perplexity over sliding windows, see `measure.windows.Passage`; yields the `Span`s before the receipt.

    Raises:
        BadInput, DoesNotFit, CorruptModel, Cancelled.
    """
    cancel = cancel or CancelToken()

    def task(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step, None, tuple[Plan, Any]]:
        from lowmem.longctx.curve import Curve
        from lowmem.measure.perplexity import Perplexity
        from lowmem.measure.scoring import score
        from lowmem.measure.windows import Passage, text_prefix

        check_token_window(window, plan.spec.context)
        passage = Passage(
            tuple(tokens_of(loaded.tokenizer, text, tokens)), window, stride, text_prefix(loaded.tokenizer)
        )
        if limit:
            limit.check_tokens(tokens_read(passage.windows()))
        action = pass_plan(plan, window)
        refuse_if_over(action, force, msg("Use a shorter window."))
        total, curve = Perplexity(), Curve(passage.scored, CURVE_POINTS)
        yield from score(loaded.model, passage, [total, curve], cancel=cancel, check=check)
        read = _Read(tokens_read(passage.windows()), window, "scoring")
        return action, (total.value, total.tokens, curve.spans(), read)

    started = time.perf_counter()
    (action, (value, count, spans, read)), peak = yield from session.work(
        msg("Measuring perplexity"), task, cancel, force=force
    )
    yield from spans
    details = {"perplexity": value, "tokens": count, "window": window, "stride": stride}
    details["spans"] = [asdict(span) for span in spans]
    repeat = _call(
        session,
        "sliding_perplexity",
        text,
        {"window": window, "stride": stride},
        tokens=repr(tokens),
        force=repr(force),
    )
    yield _receipt("perplexity", action, started, peak, count, details, snippet=repeat, read=read)


def streaming_perplexity(
    session: Session,
    text: str,
    options: GenerateOptions,
    *,
    tokens: int | None = None,
    cancel: CancelToken | None = None,
    force: bool = False,
    limit: ReadingLimit | None = None,
) -> Iterator[Step | Span | Receipt]:
    """Perplexity of a text that streams once through the KV cache described by `options`; yields each `Span` when done.

    Raises:
        BadInput, DoesNotFit, CorruptModel, Unsupported, Cancelled.
    """
    cancel = cancel or CancelToken()

    def task(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step | Span, None, tuple[Plan, Any]]:
        from lowmem.longctx.reading import Reader

        ids = with_beginning(loaded.tokenizer, tokens_of(loaded.tokenizer, text, tokens))
        if limit:
            limit.check_tokens(len(ids))
        check_window(options, plan.spec.context)
        if not options.window and len(ids) > plan.spec.context:
            raise BadInput(
                msg(
                    "The text has {ids:,} tokens, more than the model's {context:,} positions.",
                    ids=len(ids),
                    context=plan.spec.context,
                ),
                msg("Set a window, or use a shorter text."),
            )
        action = streaming_plan(plan, options, len(ids))
        refuse_if_over(action, force, msg("Use a shorter window or fewer KV bits."))
        reader, spans, nll = Reader(loaded.model, ids, options), list[Span](), 0.0
        span = max(MIN_SPAN, math.ceil(len(ids) / CURVE_POINTS))
        while reader.at < len(ids) - 1:
            start, part = reader.at, 0.0
            for losses in reader.read(min(start + span, len(ids) - 1), cancel, check):
                part += float(losses.sum())
                yield Step(reader.at, len(ids), msg("Reading the text"), "tokens")
            nll += part
            spans.append(Span(start, reader.at, perplexity(part, reader.at - start)))
            yield spans[-1]
        return action, (perplexity(nll, reader.at), reader.at, spans)

    started = time.perf_counter()
    (action, (value, count, spans)), peak = yield from session.work(msg("Reading the text"), task, cancel, force=force)
    details = {
        "perplexity": value,
        "tokens": count,
        **_cache_details(options),
        "spans": [asdict(span) for span in spans],
    }
    repeat = _call(
        session, "streaming_perplexity", text, {}, options=_options(options), tokens=repr(tokens), force=repr(force)
    )
    yield _receipt("perplexity", action, started, peak, count, details, snippet=repeat)


def recall(
    session: Session,
    text: str,
    options: GenerateOptions,
    *,
    distances: Sequence[int] = (),
    cancel: CancelToken | None = None,
    limit: ReadingLimit | None = None,
) -> Iterator[Step | Receipt]:
    """Test whether the model recalls a fact after reading `text`, within the window and beyond, see `longctx.needle`.

    Args:
        distances: tokens between fact and question; by default half the window and twice the window, or up to
            `RECALL_DISTANCE` without a window.

    Raises:
        BadInput, CorruptModel, Unsupported, Cancelled.
    """
    cancel = cancel or CancelToken()

    def task(loaded: Loaded, plan: Plan, check: Callable[[], None]) -> Generator[Step, None, tuple[Plan, Any]]:
        from lowmem.longctx import needle

        wanted = distances or _recall_distances(options, plan.spec.context)
        if limit:
            limit.check_tokens(sum(wanted))
        check_window(options, plan.spec.context)
        action = streaming_plan(plan, options, max(wanted) + needle.OVERHEAD_TOKENS)
        refuse_if_over(action, False, msg("Use a shorter window or fewer KV bits."))
        filler = tokens_of(loaded.tokenizer, text)
        filler *= 1 + max(wanted) // len(filler)
        found = []
        for number, distance in enumerate(wanted):
            yield Step(
                number, len(wanted), msg("Asking for a fact {distance:,} tokens back", distance=distance), "questions"
            )
            found.append(
                needle.recall(loaded.model, loaded.tokenizer, filler, options, distance, cancel=cancel, check=check)
            )
        return action, found

    started = time.perf_counter()
    (action, found), peak = yield from session.work(msg("Testing recall"), task, cancel)
    details = {"recalls": [{**asdict(one), "recalled": one.recalled} for one in found], **_cache_details(options)}
    notes = tuple(map(_recall_note, found))
    repeat = _call(
        session, "recall", text, {}, options=_options(options), distances=repr(tuple(one.distance for one in found))
    )
    yield _receipt("recall", action, started, peak, 0, details, notes, snippet=repeat)


def _recall_note(found: Recall) -> str:
    figures = {"distance": found.distance, "probability": found.probability}
    if found.recalled:
        return msg("A fact {distance:,} tokens back is recalled (probability {probability:.1%}).", **figures)
    return msg("A fact {distance:,} tokens back is not recalled (probability {probability:.1%}).", **figures)


def _recall_distances(options: GenerateOptions, context: int) -> tuple[int, ...]:
    from lowmem.longctx.needle import OVERHEAD_TOKENS

    return (
        (options.window // 2, 2 * options.window)
        if options.window
        else (min(RECALL_DISTANCE, context - OVERHEAD_TOKENS),)
    )


def tokens_of(tokenizer: Any, text: str, most: int | None = None) -> list[int]:
    """The first `most` token ids of `text`, without special tokens.

    Raises:
        BadInput: the text is empty.
    """
    if most is not None:
        text = text[: CHARACTERS_PER_TOKEN * most]
    ids = token_ids(tokenizer, text, most) if text.strip() else []
    if not ids:
        raise BadInput(msg("The text is empty."), msg("Use a text with at least one word."))
    return ids


def with_beginning(tokenizer: Any, ids: list[int]) -> list[int]:
    """`ids` after the special tokens that the tokenizer puts in front of every text."""
    from lowmem.measure.windows import text_prefix

    return [*text_prefix(tokenizer), *ids]


def _cache_details(options: GenerateOptions) -> dict[str, Any]:
    sinks = options.sinks if options.window else 0
    return {"window": options.window, "sinks": sinks, "cache_type": options.cache_type}


def _receipt(
    action: str,
    plan: Plan,
    started: float,
    peak: dict[str, int],
    tokens: int,
    details: dict[str, Any],
    notes: tuple[str, ...] = (),
    disk_bytes: int = 0,
    snippet: str = "",
    read: _Read | None = None,
) -> Receipt:
    seconds = time.perf_counter() - started
    expected = 0.0
    if read is not None:
        expected = or_zero(reading_seconds, plan, *read)
        learn_reading(plan, *read, seconds)
    predicted = dict(plan.predicted)
    if action != "hidden":  # the others hold logits for every token
        predicted[plan.main.memory] += LOGITS_COPIES * LOGITS_BYTES
    return replace(
        Receipt(action, plan.spec.name, plan.precision, plan.device, seconds, predicted_seconds=expected),
        predicted=predicted,
        measured={memory: peak[memory] for memory in predicted if memory in peak},
        prompt_tokens=tokens,
        prefill_tps=tokens / seconds if seconds else 0.0,
        disk_bytes=disk_bytes,
        notes=notes,
        snippet=snippet,
        details=details,
    )


def _call(session: Session, action: str, text: str, values: dict[str, Any], **code: str) -> str:
    """Python that loads the resident model again and repeats an action of this module.

    Args:
        values: arguments of the action; code: more of them as code, those at "None" or "False" left out.
    """
    assert session.plan is not None  # the action has just run on it
    more = [f"{name}={value}" for name, value in code.items() if value not in ("None", "False")]
    call = ", ".join(["session", "text", *([arguments(values)] if values else []), *more])
    return (
        "from pathlib import Path\n"
        f"from lowmem.longctx.actions import {action}\n"
        f"{load_snippet(session.plan)}"
        f"text = {literal(text, 'text.json')}\n"
        f"for event in {action}({call}):\n"
        "    print(event)\n"
    )


def _options(options: GenerateOptions) -> str:
    return f"lowmem.GenerateOptions({arguments(changed(options))})"
