"""Estimates, parity checks and benchmarks of exports as HTML. Pure functions of data."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.export.folder import RUN
from lowmem.export.request import ExportEstimate
from lowmem.plots.engines import ENGINES
from lowmem.ui.html import parts
from lowmem.ui.i18n.strings import say
from lowmem.units import format_bytes


def card(expected: ExportEstimate, original_bytes: int) -> str:
    """Size, memory and time of an export."""
    facts = [
        (say("size"), f"{format_bytes(original_bytes)} → {format_bytes(expected.disk_bytes)}"),
        (say("peak"), format_bytes(expected.ram_bytes)),
        (say("export_session"), format_bytes(expected.session_bytes)),
    ]
    return parts.estimate(expected, facts, parts.quiet(expected.caution) if expected.caution else "")


def receipt(one: Receipt) -> str:
    """The parity check, what the optimizer did, predicted and measured sizes, and the files."""
    details = one.details
    body = parity(details["parity"], details["kind"]) + optimized(details.get("optimised") or {})
    return parts.made(one, body, program(Path(details["folder"])))


def program(folder: Path) -> str:
    """The code that runs the folder elsewhere."""
    path = folder / RUN
    if not path.is_file():
        return ""
    code = escape(path.read_text(encoding="utf-8"))
    return (
        f'<details class="lm-files"><summary>{escape(say("export_program"))}</summary>'
        f'<pre class="lm-code" tabindex="0">{code}</pre></details>'
    )


def parity(checked: dict[str, Any], kind: str = "fused") -> str:
    """Agreement with the original in prefill and decoding; an encoder has no decoding."""
    phases = ("prefill",) if kind == "encoder" else ("prefill", "decode")
    header = say("export_parity_encoder" if kind == "encoder" else "export_parity")
    rows = [
        (
            say(f"export_{phase}"),
            f"{checked[phase]['max_difference']:.2g}",
            f"{checked[phase]['kl']:.4f}",
            f"{checked[phase]['agreement']:.1%}",
            f"{checked[phase]['tokens']:,}",
        )
        for phase in phases
    ]
    return parts.table(header.split("|"), rows)


def optimized(report: dict[str, Any]) -> str:
    """Before and after the optimizer."""
    if not report.get("after"):
        return parts.quiet(say("export_not_optimised")) if report else ""
    before, after = report["before"], report["after"]
    fusions = ", ".join(f"{count} {kind}" for kind, count in report.get("fusions", {}).items()) or "none"
    rows = [
        (say("export_nodes"), f"{before['nodes']:,}", f"{after['nodes']:,}"),
        (say("size"), format_bytes(before["bytes"]), format_bytes(after["bytes"])),
        (say("export_latency"), f"{1000 * before['seconds']:.1f} ms", f"{1000 * after['seconds']:.1f} ms"),
        (say("export_fusions"), "", fusions),
    ]
    return parts.table(say("export_optimised").split("|"), rows)


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
    return parts.table(say("export_benchmark_table").split("|"), rows)


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
