"""Estimates, parity checks and benchmarks of exports as HTML. Pure functions of data; everything from outside is escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.export.folder import RUN
from lowmem.export.request import ExportEstimate
from lowmem.plots.engines import ENGINES
from lowmem.ui.html import plan as render
from lowmem.ui.html.quantize import figures, files, rounded
from lowmem.ui.i18n.strings import name, say
from lowmem.units import format_bytes, format_seconds


def card(expected: ExportEstimate, original_bytes: int) -> str:
    """What would be made and what it would cost."""
    facts = [
        (say("size"), f"{format_bytes(original_bytes)} → {format_bytes(expected.disk_bytes)}"),
        (say("peak"), format_bytes(expected.ram_bytes)),
        (say("export_session"), format_bytes(expected.session_bytes)),
        (say("time"), say("about", time=rounded(expected.seconds))),
    ]
    cells = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in facts)
    pill = (
        f'<span class="lm-pill" data-verdict="{expected.verdict}">{escape(name("verdicts", expected.verdict))}</span>'
    )
    return (
        f'<section class="lm-forecast" data-verdict="{expected.verdict}">'
        f'<div class="lm-head"><h2>{escape(say("predicted"))}</h2>{pill}</div><dl class="lm-pairs">{cells}</dl>'
        f'<p class="lm-sentence" role="status">{escape(expected.sentence())}</p>'
        f"{render.quiet(expected.caution) if expected.caution else ''}</section>"
    )


def receipt(one: Receipt) -> str:
    """The parity check, predicted against measured, what the optimiser did, and the files."""
    details = one.details
    pairs = [
        (say("on_disk_size"), details["predicted_bytes"], one.disk_bytes),
        *((say("peak"), one.predicted[key], one.measured[key]) for key in one.measured if key in one.predicted),
    ]
    bars = "".join(render.against(*pair) for pair in pairs)
    notes = "".join(f"<li>{escape(note)}</li>" for note in one.notes)
    folder = Path(details["folder"])
    facts = f"{escape(say('time'))} {escape(format_seconds(one.seconds))} · {escape(folder.name)}"
    return (
        f'<section class="lm-made"><h2>{escape(say("result"))}</h2>{parity(details["parity"], details["kind"])}'
        f"{optimised(details.get('optimised') or {})}{bars}"
        f'<p class="lm-muted lm-small">{facts}</p><ul class="lm-notes">{notes}</ul>{program(folder)}{files(folder)}</section>'
    )


def program(folder: Path) -> str:
    """What runs the folder elsewhere, to be read and copied."""
    path = folder / RUN
    if not path.is_file():
        return ""
    code = escape(path.read_text(encoding="utf-8"))
    return (
        f'<details class="lm-files"><summary>{escape(say("export_program"))}</summary>'
        f'<pre class="lm-code" tabindex="0">{code}</pre></details>'
    )


def parity(found: dict[str, Any], kind: str = "fused") -> str:
    """Agreement with the original, read at once and token by token; an encoder only reads."""
    passes = ("prefill",) if kind == "encoder" else ("prefill", "decode")
    header = say("export_parity_encoder" if kind == "encoder" else "export_parity")
    rows = [
        (
            say(f"export_{one}"),
            f"{found[one]['max_difference']:.2g}",
            f"{found[one]['kl']:.4f}",
            f"{found[one]['agreement']:.1%}",
            f"{found[one]['tokens']:,}",
        )
        for one in passes
    ]
    return figures(header.split("|"), rows)


def optimised(report: dict[str, Any]) -> str:
    """Before and after the optimiser."""
    if not report.get("after"):
        return render.quiet(say("export_not_optimised")) if report else ""
    before, after = report["before"], report["after"]
    fusions = ", ".join(f"{count} {kind}" for kind, count in report.get("fusions", {}).items()) or "none"
    rows = [
        (say("export_nodes"), f"{before['nodes']:,}", f"{after['nodes']:,}"),
        (say("size"), format_bytes(before["bytes"]), format_bytes(after["bytes"])),
        (say("export_latency"), f"{1000 * before['seconds']:.1f} ms", f"{1000 * after['seconds']:.1f} ms"),
        (say("export_fusions"), "", fusions),
    ]
    return figures(say("export_optimised").split("|"), rows)


def benchmark_table(result: dict[str, Any]) -> str:
    """The figures of a benchmark."""
    rows = [
        (
            f"{length}",
            *(f"{result[engine]['prefill_tps'][index]:,.0f}" for engine in ENGINES),
            *(_milliseconds(result[engine]["token_ms"][index]) for engine in ENGINES),
        )
        for index, length in enumerate(result["prompts"])
    ]
    return figures(say("export_benchmark_table").split("|"), rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
