"""Forecasts, receipts and comparisons as HTML. Pure functions of data; everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from lowmem.events import Receipt
from lowmem.measure.rows import Row
from lowmem.quant.estimate import Estimate
from lowmem.ui.html import plan as render
from lowmem.ui.i18n.strings import ENGLISH, name, say
from lowmem.units import format_bytes, format_seconds


def card(expected: Estimate) -> str:
    """What would be made and what it would expected."""
    pill = (
        f'<span class="lm-pill" data-verdict="{expected.verdict}">{escape(name("verdicts", expected.verdict))}</span>'
    )
    facts = [
        (say("size"), f"{format_bytes(expected.original_bytes)} → {format_bytes(expected.output_bytes)}"),
        (say("bits_per_weight"), f"{expected.bits_per_weight:.2f}"),
        (say("peak"), format_bytes(expected.ram_bytes)),
        (say("time"), say("about", time=rounded(expected.seconds))),
    ]
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    return (
        f'<section class="lm-forecast" data-verdict="{expected.verdict}">'
        f'<div class="lm-head"><h2>{escape(say("predicted"))}</h2>{pill}</div><dl class="lm-pairs">{cells}</dl>'
        f'<p class="lm-sentence" role="status">{escape(expected.sentence())}</p>'
        f'<p class="lm-muted lm-small">{escape(say("timing", why=expected.timing))}</p></section>'
    )


def rounded(seconds: float) -> str:
    """A forecast of time has one or two figures."""
    if seconds < 60:
        return f"{max(1, round(seconds)) if seconds < 20 else round(seconds, -1):.0f} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def receipt(one: Receipt) -> str:
    """The course's table, predicted against measured, and the files."""
    details, folder = one.details, Path(one.details["folder"])
    cells = (
        one.precision,
        f"{details['bits_per_weight']:.2f}",
        format_bytes(details["original_bytes"]),
        format_bytes(one.disk_bytes),
        f"{details['loss']:.3%}",
    )
    table = figures(ENGLISH["course_table"], [cells])
    pairs = [
        (say("on_disk_size"), details["predicted_bytes"], one.disk_bytes),
        *((say("peak"), one.predicted[m], one.measured[m]) for m in one.measured if m in one.predicted),
    ]
    bars = "".join(render.against(*pair) for pair in pairs)
    notes = "".join(f"<li>{escape(note)}</li>" for note in one.notes)
    facts = f"{escape(say('time'))} {escape(format_seconds(one.seconds))} · {escape(folder.name)}"
    return (
        f'<section class="lm-made"><h2>{escape(say("result"))}</h2>{table}{bars}'
        f'<p class="lm-muted lm-small">{facts}</p>'
        f"{f'<ul class=lm-notes>{notes}</ul>' if notes else ''}{files(folder)}</section>"
    )


def files(folder: Path) -> str:
    """Links to the files as they lie: a download button would copy every one of them first."""
    if not folder.is_dir():
        return ""
    rows = "".join(
        f'<li><a href="gradio_api/file={quote(str(file))}" download="{escape(file.name)}">{escape(file.name)}</a>'
        f'<span class="lm-num lm-muted">{format_bytes(file.stat().st_size)}</span></li>'
        for file in sorted(folder.iterdir())
        if file.is_file()
    )
    return f'<details class="lm-files"><summary>{escape(say("files"))}</summary><ul>{rows}</ul></details>'


def comparison(rows: Sequence[Row]) -> str:
    """The table of a comparison, as far as it is."""
    return figures(ENGLISH["compare_table"], [_cells(row) for row in rows], spanning=len(ENGLISH["compare_table"]))


def _cells(row: Row) -> tuple[str, ...]:
    if row.error:
        return row.variant, row.error

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    error = row.prediction_error
    return (
        row.variant,
        shown(row.bits_per_weight, ".1f"),
        "-" if row.weight_bytes is None else format_bytes(row.weight_bytes),
        shown(row.perplexity, ",.2f"),
        shown(row.kl, ".4f"),
        shown(row.agreement, ".1%"),
        shown(row.prefill_tps, ",.0f"),
        shown(row.decode_tps, ",.1f"),
        "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        "-" if error is None else f"{error:+.1%}",
    )


def figures(header: Sequence[str], rows: Iterable[Sequence[str]], spanning: int = 0) -> str:
    """A table of numbers; a row of two cells, when `spanning` columns are there, says why it has none."""
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = ""
    for row in rows:
        failed = spanning and len(row) == 2
        rest = f'<td colspan="{spanning - 1}" class="lm-failed">{escape(row[1])}</td>' if failed else ""
        rest = rest or "".join(f'<td class="lm-num">{escape(cell)}</td>' for cell in row[1:])
        body += f"<tr><th>{escape(row[0])}</th>{rest}</tr>"
    return (
        f'<div class="lm-table lm-figures" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def explanations() -> str:
    """Each method in plain words."""
    parts = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(how)}</dd></div>" for what, how in ENGLISH["how"])
    return f'<dl class="lm-how">{parts}</dl>'


def drawing(svg: str) -> str:
    return f'<figure class="lm-drawing">{svg}</figure>'
