"""Long texts as HTML: what is remembered and what it costs, results and links. Pure functions of data."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lowmem.events import Receipt
from lowmem.longctx.strategies import Point
from lowmem.planning.plan import Plan
from lowmem.ui.i18n.strings import ENGLISH, say
from lowmem.units import format_bytes, format_seconds


def memory(plan: Plan | None, without: Plan | None, tokens: int) -> str:
    """What is remembered under these options, in bytes, and what all of `tokens` would take."""
    if plan is None or without is None:
        return f'<p class="lm-notice" data-kind="quiet">{escape(say("long_load_first"))}</p>'
    kv, all_kv = plan.main.share("kv"), without.main.share("kv")
    told = f"{plan.window:,} + {plan.sinks:,}" if plan.window else f"{plan.context:,}"
    rows = [
        (say("long_remembered"), say("long_tokens", tokens=told)),
        (say("long_cache"), format_bytes(kv)),
        (say("long_all", tokens=f"{tokens:,}"), format_bytes(all_kv)),
    ]
    body = "".join(f"<div><dt>{escape(what)}</dt><dd class='lm-num'>{escape(value)}</dd></div>" for what, value in rows)
    return f'<section class="lm-remembered"><dl class="lm-stats">{body}</dl><p class="lm-muted lm-small">{escape(_honest(plan))}</p></section>'


def _honest(plan: Plan) -> str:
    return (
        say("long_forgets", window=f"{plan.window:,}")
        if plan.window
        else say("long_keeps", context=f"{plan.spec.context:,}")
    )


def explanation() -> str:
    parts = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(how)}</dd></div>" for what, how in ENGLISH["long_how"])
    return f'<dl class="lm-how">{parts}</dl>'


def link(path: Path, label: str) -> str:
    """A link to the file where it lies: nothing is copied."""
    if not path.is_file():
        return ""
    size = format_bytes(path.stat().st_size)
    return (
        f'<p class="lm-link"><a href="gradio_api/file={quote(str(path))}" download="{escape(path.name)}">{escape(label)}</a>'
        f' <span class="lm-num lm-muted">{size}</span></p>'
    )


def perplexity(receipt: Receipt) -> str:
    details = receipt.details
    facts = [
        ("perplexity", f"{details['perplexity']:,.3f}"),
        ("tokens", f"{details['tokens']:,}"),
        ("time", format_seconds(receipt.seconds)),
    ]
    return _facts(facts)


def hidden(receipt: Receipt) -> str:
    path = Path(receipt.details["file"])
    shape = " x ".join(f"{size:,}" for size in receipt.details["shape"])
    facts = [
        ("shape", f"{shape} {receipt.details['dtype']}"),
        ("windows", f"{receipt.details['windows']:,}"),
        ("tokens/s", f"{receipt.prefill_tps:,.0f}"),
    ]
    notes = "".join(f'<p class="lm-muted lm-small">{escape(note)}</p>' for note in receipt.notes)
    return _facts(facts) + link(path, path.name) + notes


def recalls(receipt: Receipt) -> str:
    """A fact told so many tokens before it is asked for."""
    header = ENGLISH["recall_table"]
    rows = [_recall_cells(one) for one in receipt.details["recalls"]]
    return _table(header, rows)


def _recall_cells(one: dict[str, Any]) -> tuple[str, ...]:
    verdict = say("recalled") if one["recalled"] else say("forgotten")
    return f"{one['distance']:,}", verdict, f"{one['probability']:.1%}", f"{one['control']:.1%}"


def points(found: Sequence[Point]) -> str:
    """The exercise as a table: the last point of every way, or why it has none."""
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
    return _table(ENGLISH["strategies_table"], rows)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<div><dt>{escape(k)}</dt><dd class="lm-num">{escape(v)}</dd></div>' for k, v in facts)
    return f'<dl class="lm-stats">{body}</dl>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = ""
    for row in rows:
        failed = len(row) == 2 < len(header)
        cells = (
            f'<td colspan="{len(header) - 1}" class="lm-failed">{escape(row[1])}</td>'
            if failed
            else "".join(f'<td class="lm-num">{escape(cell)}</td>' for cell in row[1:])
        )
        body += f"<tr><th>{escape(row[0])}</th>{cells}</tr>"
    return (
        f'<div class="lm-table lm-figures" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
