"""Estimates, parity checks and benchmarks of exports as HTML. Pure functions of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem.events import Receipt
from lowmem.export.folder import RUN
from lowmem.export.request import ExportEstimate
from lowmem.messages import Message, msg
from lowmem.plots.engines import ENGINES
from lowmem.ui.html import parts
from lowmem.ui.language import escape
from lowmem.ui.names import name
from lowmem.units import format_bytes


def card(expected: ExportEstimate, original_bytes: int) -> str:
    """Size, memory and time of an export."""
    facts = [
        (
            msg("Size"),
            Message(
                "{original_bytes} → {disk_bytes}",
                original_bytes=format_bytes(original_bytes),
                disk_bytes=format_bytes(expected.disk_bytes),
            ),
        ),
        (msg("Peak RAM"), format_bytes(expected.ram_bytes)),
        (msg("Weights in memory"), format_bytes(expected.session_bytes)),
    ]
    return parts.estimate(expected, facts, parts.small(expected.caution))


def receipt(one: Receipt) -> str:
    """The parity check, the effect of the optimizer, predicted and measured sizes, and the files."""
    details = one.details
    body = parity(details["parity"], details["kind"]) + optimized(details.get("optimised") or {})
    return parts.made(one, body, program(Path(details["folder"])))


def program(folder: Path) -> str:
    """Code that runs the folder without lowmem."""
    path = folder / RUN
    if not path.is_file():
        return ""
    code = escape(path.read_text(encoding="utf-8"))
    return (
        f'<details class="lm-files"><summary>{escape(msg("Python code to run it with only onnxruntime, numpy and tokenizers"))}</summary>'
        f'<pre class="lm-code" tabindex="0">{code}</pre></details>'
    )


def parity(checked: dict[str, Any], kind: str = "fused") -> str:
    """Agreement with the original in prefill and decoding; an encoder has no decoding."""
    phases = ("prefill",) if kind == "encoder" else ("prefill", "decode")
    figures = (
        (msg("Relative error"), msg("Cosine above 0.99"), msg("States"))
        if kind == "encoder"
        else (msg("KL divergence"), msg("Top-1 match"), msg("Tokens"))
    )
    header = (msg("Compared with the original"), msg("Largest difference"), *figures)
    rows = [
        (
            name("export", phase),
            Message("{max_difference:.2g}", max_difference=checked[phase]["max_difference"]),
            Message("{kl:.4f}", kl=checked[phase]["kl"]),
            Message("{agreement:.1%}", agreement=checked[phase]["agreement"]),
            Message("{tokens:,}", tokens=checked[phase]["tokens"]),
        )
        for phase in phases
    ]
    return parts.table(header, rows)


def optimized(report: dict[str, Any]) -> str:
    """Before and after the optimizer."""
    if not report.get("after"):
        return parts.quiet(msg("The optimizer did not help, so the graph was left unchanged.")) if report else ""
    before, after = report["before"], report["after"]
    fusions = ", ".join(f"{count} {kind}" for kind, count in report.get("fusions", {}).items()) or msg("none")
    rows = [
        (msg("Nodes"), Message("{nodes:,}", nodes=before["nodes"]), Message("{nodes:,}", nodes=after["nodes"])),
        (msg("Size"), format_bytes(before["bytes"]), format_bytes(after["bytes"])),
        (
            msg("64 tokens at once"),
            Message("{seconds:.1f} ms", seconds=1000 * before["seconds"]),
            Message("{seconds:.1f} ms", seconds=1000 * after["seconds"]),
        ),
        (msg("Fusions"), "", fusions),
    ]
    return parts.table((msg("Optimizer"), msg("Before"), msg("After")), rows)


def benchmark_table(result: dict[str, Any]) -> str:
    """The figures of a benchmark."""
    rows = [
        (
            f"{length}",
            *(Message("{prefill_tps:,.0f}", prefill_tps=result[engine]["prefill_tps"][index]) for engine in ENGINES),
            *(_milliseconds(result[engine]["token_ms"][index]) for engine in ENGINES),
        )
        for index, length in enumerate(result["prompts"])
    ]
    return parts.table(
        (
            msg("Prompt tokens"),
            msg("PyTorch prefill/s"),
            msg("ONNX prefill/s"),
            msg("PyTorch per token"),
            msg("ONNX per token"),
        ),
        rows,
    )


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else Message("{value:.1f} ms", value=value)
