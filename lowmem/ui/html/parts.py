"""Building blocks of the other renderers: tables, lists, pills, cards, links. Escapes all text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lowmem.events import Receipt
from lowmem.messages import Message, msg
from lowmem.ui.language import escape
from lowmem.ui.names import name
from lowmem.units import format_bytes, format_seconds, format_time_range

Pairs = Iterable[tuple[str, str]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of numbers. A row of two cells in a wider table has a name and the reason why it has no numbers."""
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    body = "".join(_row(row, len(header)) for row in rows)
    return (
        f'<div class="lm-table lm-figures" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(row: Sequence[str], columns: int) -> str:
    if len(row) == 2 < columns:
        cells = f'<td colspan="{columns - 1}" class="lm-failed">{escape(row[1])}</td>'
    else:
        cells = "".join(f'<td class="lm-num">{escape(cell)}</td>' for cell in row[1:])
    return f"<tr><th>{escape(row[0])}</th>{cells}</tr>"


def _definitions(kind: str, items: Pairs, number: str = "") -> str:
    rows = "".join(f"<div><dt>{escape(key)}</dt><dd{number}>{escape(value)}</dd></div>" for key, value in items)
    return f'<dl class="{kind}">{rows}</dl>'


def stats(items: Pairs) -> str:
    """Labels above numbers, in columns."""
    return _definitions("lm-stats", items, ' class="lm-num"')


def facts(items: Pairs) -> str:
    """Labels above words, in columns."""
    return _definitions("lm-facts", items)


def pairs(items: Pairs) -> str:
    """Labels beside words, in rows."""
    return _definitions("lm-pairs", items)


def explanations(items: Pairs) -> str:
    """Terms with a paragraph each."""
    return _definitions("lm-how", items)


def quiet(text: str) -> str:
    """A notice in a muted color."""
    return f'<p class="lm-notice" data-kind="quiet">{escape(text)}</p>'


def small(*lines: str) -> str:
    """Small muted lines; empty ones are left out."""
    return "".join(f'<p class="lm-muted lm-small">{escape(line)}</p>' for line in lines if line)


def pill(verdict: str) -> str:
    return f'<span class="lm-pill" data-verdict="{verdict}">{escape(name("verdicts", verdict))}</span>'


def drawing(svg: str) -> str:
    return f'<figure class="lm-drawing">{svg}</figure>'


def track(spoken: str, *parts: tuple[str, str]) -> str:
    """A thin bar of (class, width); silent for screen readers when there is nothing to say."""
    role = f' role="img" aria-label="{escape(spoken)}"' if spoken else ""
    spans = "".join(f'<span class="{kind}" style="width:{width}"></span>' for kind, width in parts)
    return f'<div class="lm-track"{role}>{spans}</div>'


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole > 0 else "0%"


def bar_title(label: str, right: str) -> str:
    """A line above a bar; `right` is HTML."""
    return f'<div class="lm-bar-title"><span>{escape(label)}</span>{right}</div>'


def bar(label: str, width: str, number: str, kind: str = "") -> str:
    """A bar between its label and its number."""
    return (
        f'<div class="lm-pair"><span>{escape(label)}</span>{track("", (kind, width))}'
        f'<b class="lm-num">{escape(number)}</b></div>'
    )


def against(
    label: str, predicted: float, measured: float, form: Callable[[float], str] = format_bytes, tolerance: float = 0.1
) -> str:
    """A number, bytes by default, as predicted and as measured."""
    error = (predicted - measured) / measured if measured else 0.0
    near = abs(error) <= tolerance
    difference = form(abs(predicted - measured))
    if near:
        verdict = deviation(measured / predicted - 1 if measured and predicted else 0.0)
    elif error < 0:
        verdict = msg("{difference} more than predicted", difference=difference)
    else:
        verdict = msg("{difference} less than predicted", difference=difference)
    title = bar_title(label, f'<span class="lm-pill" data-near="{str(near).lower()}">{escape(verdict)}</span>')
    rows = "".join(
        bar(word, percent(count, max(predicted, measured)), form(count), kind)
        for word, kind, count in ((msg("predicted"), "lm-predicted", predicted), (msg("measured"), "", measured))
    )
    spoken = msg(
        "{label}: predicted {predicted}, measured {measured}",
        label=label,
        predicted=form(predicted),
        measured=form(measured),
    )
    return f'<div class="lm-against" role="img" aria-label="{escape(spoken)}">{title}{rows}</div>'


def deviation(share: float) -> str:
    """How far a measurement is from its prediction, in words; `share` is measured / predicted - 1."""
    figure = Message("{share:.1%}", share=abs(share))
    if str(figure) == "0.0%":
        return msg("as predicted")
    return (
        msg("{share} above the prediction", share=figure)
        if share > 0
        else msg("{share} below the prediction", share=figure)
    )


def peaks(receipt: Receipt, label: Callable[[str], str]) -> str:
    """The peak of every memory that was predicted, against the measured one."""
    known = [memory for memory in receipt.measured if receipt.predicted.get(memory)]
    return "".join(against(label(memory), receipt.predicted[memory], receipt.measured[memory]) for memory in known)


def notes(lines: Sequence[str]) -> str:
    """A list of sentences, nothing for none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="lm-notes">{items}</ul>' if items else ""


def estimate(expected: Any, items: Pairs, note: str) -> str:
    """The card of an estimate with a `verdict`, a `sentence()` and `seconds` or None; `note` is HTML below."""
    time = msg("not measured yet") if expected.seconds is None else format_time_range(expected.seconds)
    timed = [*items, (msg("Time"), time)]
    return (
        f'<section class="lm-estimate" data-verdict="{expected.verdict}">'
        f'<div class="lm-head"><h2>{escape(msg("Predicted"))}</h2>{pill(expected.verdict)}</div>{pairs(timed)}'
        f'<p class="lm-sentence" role="status">{escape(expected.sentence())}</p>{note}</section>'
    )


def made(receipt: Receipt, body: str, more: str = "") -> str:
    """The receipt of a result in a folder: `body`, predicted and measured sizes, notes, `more`, files."""
    folder = Path(receipt.details["folder"])
    size = against(msg("Size on disk"), receipt.details["predicted_bytes"], receipt.disk_bytes)
    took = small(Message("{label} {time} · {folder}", label=msg("Time"), time=taken(receipt), folder=folder.name))
    bars = size + peaks(receipt, lambda _: msg("Peak RAM"))
    return (
        f'<section class="lm-made"><h2>{escape(msg("Result"))}</h2>{body}{bars}{took}'
        f"{notes(receipt.notes)}{more}{files(folder)}</section>"
    )


def taken(receipt: Receipt) -> str:
    """The time of an action, with the predicted one if there was one."""
    seconds = format_seconds(receipt.seconds)
    if not receipt.predicted_seconds:
        return seconds
    return msg("{seconds}, predicted {range}", seconds=seconds, range=format_time_range(receipt.predicted_seconds))


def link(path: Path, label: str) -> str:
    """A link to a file in place, with its size; nothing is copied. "" if there is none."""
    return f'<p class="lm-link">{_link(path, label)}</p>' if path.is_file() else ""


def files(folder: Path) -> str:
    """Links to a folder's files."""
    if not folder.is_dir():
        return ""
    rows = "".join(f"<li>{_link(file, file.name)}</li>" for file in sorted(folder.iterdir()) if file.is_file())
    return f'<details class="lm-files"><summary>{escape(msg("Files"))}</summary><ul>{rows}</ul></details>'


def _link(path: Path, label: str) -> str:
    return (
        f'<a href="gradio_api/file={quote(str(path))}" download="{escape(path.name)}">{escape(label)}</a>'
        f' <span class="lm-num lm-muted">{escape(format_bytes(path.stat().st_size))}</span>'
    )
