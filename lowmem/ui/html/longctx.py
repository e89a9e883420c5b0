"""Results on long texts as HTML. Pure functions of data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.longctx.strategies import Point
from lowmem.planning.plan import Plan
from lowmem.ui.html import parts
from lowmem.ui.i18n.strings import ENGLISH, say
from lowmem.units import format_bytes, format_seconds


def memory(plan: Plan | None, without: Plan | None, tokens: int) -> str:
    """The KV cache under these options, in bytes, and without a window for all of `tokens`."""
    if plan is None or without is None:
        return parts.quiet(say("long_load_first"))
    cached = f"{plan.window:,} + {plan.sinks:,}" if plan.window else f"{plan.context:,}"
    rows = [
        (say("long_cached"), say("long_tokens", tokens=cached)),
        (say("long_cache"), format_bytes(plan.main.share("kv"))),
        (say("long_all", tokens=f"{tokens:,}"), format_bytes(without.main.share("kv"))),
    ]
    evicted = (
        say("long_evicts", window=f"{plan.window:,}")
        if plan.window
        else say("long_keeps", context=f"{plan.spec.context:,}")
    )
    return f'<section class="lm-remembered">{parts.stats(rows)}{parts.small(evicted)}</section>'


def perplexity(receipt: Receipt) -> str:
    details = receipt.details
    facts = [
        ("perplexity", f"{details['perplexity']:,.3f}"),
        ("tokens", f"{details['tokens']:,}"),
        ("time", format_seconds(receipt.seconds)),
    ]
    return parts.stats(facts)


def hidden(receipt: Receipt) -> str:
    path = Path(receipt.details["file"])
    shape = " x ".join(f"{size:,}" for size in receipt.details["shape"])
    facts = [
        ("shape", f"{shape} {receipt.details['dtype']}"),
        ("windows", f"{receipt.details['windows']:,}"),
        ("tokens/s", f"{receipt.prefill_tps:,.0f}"),
    ]
    return parts.stats(facts) + parts.link(path, path.name) + parts.small(*receipt.notes)


def recalls(receipt: Receipt) -> str:
    """Whether a word was recalled, at each distance."""
    return parts.table(ENGLISH["recall_table"], map(_recall_cells, receipt.details["recalls"]))


def _recall_cells(one: dict[str, Any]) -> tuple[str, ...]:
    verdict = say("recalled") if one["recalled"] else say("forgotten")
    return f"{one['distance']:,}", verdict, f"{one['probability']:.1%}", f"{one['control']:.1%}"


def points(found: Sequence[Point]) -> str:
    """Cache strategies as a table: the last point of each, or why it has none."""
    latest = {point.strategy: point for point in found}
    rows = [
        (point.strategy, point.error)
        if point.error
        else (
            point.strategy,
            f"{point.tokens:,}",
            f"{point.perplexity:,.2f}",
            f"{1000 * (point.token_seconds or 0):,.1f}",
            format_bytes(point.kv_bytes or 0),
            format_bytes(point.ram_bytes or 0),
        )
        for point in latest.values()
    ]
    return parts.table(ENGLISH["strategies_table"], rows)
