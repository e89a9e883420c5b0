"""Results on long texts as HTML. Pure functions of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.longctx.strategies import Point
from lowmem.messages import Message, msg
from lowmem.planning.plan import Plan
from lowmem.ui.html import parts
from lowmem.ui.names import NAMES
from lowmem.units import format_bytes, format_seconds


def memory(plan: Plan | None, without: Plan | None, tokens: int) -> str:
    """The KV cache under these options, in bytes, and without a window for all of `tokens`."""
    if plan is None or without is None:
        return parts.quiet(msg("Load a model in the Generate tab first. Cache strategies can run without one."))
    cached = (
        Message("{window:,} + {sinks:,}", window=plan.window, sinks=plan.sinks)
        if plan.window
        else Message("{context:,}", context=plan.context)
    )
    rows = [
        (msg("Cached"), msg("{tokens} tokens", tokens=cached)),
        (msg("KV cache"), format_bytes(plan.main.share("kv"))),
        (
            msg("All {tokens} tokens", tokens=Message("{tokens:,}", tokens=tokens)),
            format_bytes(without.main.share("kv")),
        ),
    ]
    evicted = (
        msg(
            "Tokens more than {window} positions back are evicted, except for the first few.",
            window=Message("{window:,}", window=plan.window),
        )
        if plan.window
        else msg(
            "All tokens stay cached, up to the model's context of {context} tokens.",
            context=Message("{context:,}", context=plan.spec.context),
        )
    )
    return f'<section class="lm-cached">{parts.stats(rows)}{parts.small(evicted)}</section>'


def perplexity(receipt: Receipt) -> str:
    details = receipt.details
    facts = [
        (msg("perplexity"), Message("{perplexity:,.3f}", perplexity=details["perplexity"])),
        (msg("tokens"), Message("{tokens:,}", tokens=details["tokens"])),
        (msg("time"), format_seconds(receipt.seconds)),
    ]
    return parts.stats(facts)


def hidden(receipt: Receipt) -> str:
    path = Path(receipt.details["file"])
    shape = " x ".join(Message("{size:,}", size=size) for size in receipt.details["shape"])
    facts = [
        (msg("shape"), f"{shape} {receipt.details['dtype']}"),
        (msg("windows"), Message("{windows:,}", windows=receipt.details["windows"])),
        (msg("tokens/s"), Message("{prefill_tps:,.0f}", prefill_tps=receipt.prefill_tps)),
    ]
    return parts.stats(facts) + parts.link(path, path.name) + parts.small(*receipt.notes)


def recalls(receipt: Receipt) -> str:
    """Whether a word was recalled, at each distance."""
    return parts.table(NAMES["recall_table"], map(_recall_cells, receipt.details["recalls"]))


def _recall_cells(one: dict[str, Any]) -> tuple[str, ...]:
    verdict = msg("recalled") if one["recalled"] else msg("not recalled")
    return (
        Message("{distance:,}", distance=one["distance"]),
        verdict,
        Message("{probability:.1%}", probability=one["probability"]),
        Message("{control:.1%}", control=one["control"]),
    )


def points(found: Sequence[Point]) -> str:
    """Cache strategies as a table: the last point of each, or why it has none."""
    latest = {point.strategy: point for point in found}
    rows = [
        (point.strategy, point.error)
        if point.error
        else (
            point.strategy,
            Message("{tokens:,}", tokens=point.tokens),
            Message("{perplexity:,.2f}", perplexity=point.perplexity),
            Message("{token_seconds:,.1f}", token_seconds=1000 * (point.token_seconds or 0)),
            format_bytes(point.kv_bytes or 0),
            format_bytes(point.ram_bytes or 0),
        )
        for point in latest.values()
    ]
    return parts.table(NAMES["strategies_table"], rows)
