"""Estimates, receipts and comparisons of quantizations as HTML. Pure functions of data."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.events import Receipt
from lowmem.measure.rows import Row
from lowmem.messages import Message, msg
from lowmem.quant.estimate import Estimate
from lowmem.ui.html import parts
from lowmem.ui.names import NAMES
from lowmem.units import format_bytes


def card(expected: Estimate) -> str:
    """Size, memory and time of a quantization."""
    facts = [
        (
            msg("Size"),
            Message(
                "{original_bytes} → {output_bytes}",
                original_bytes=format_bytes(expected.original_bytes),
                output_bytes=format_bytes(expected.output_bytes),
            ),
        ),
        (msg("Bits per quantized weight"), Message("{bits:.2f}", bits=expected.bits_per_quantized_weight)),
        (msg("Bits per weight, all included"), Message("{bits:.2f}", bits=expected.bits_per_parameter)),
        (msg("Peak RAM"), format_bytes(expected.ram_bytes)),
    ]
    return parts.estimate(expected, facts, "")


def receipt(one: Receipt) -> str:
    """The course's table, predicted and measured sizes, and the files."""
    cells = (
        one.precision,
        Message("{bits:.2f}", bits=one.details["bits_per_quantized_weight"]),
        format_bytes(one.details["original_bytes"]),
        format_bytes(one.disk_bytes),
        Message("{loss:.3g}%", loss=100 * one.details["loss"]),
    )
    return parts.made(one, parts.table(NAMES["course_table"], [cells]))


def comparison(rows: Sequence[Row]) -> str:
    """The table of a comparison, with the rows measured so far."""
    return parts.table(NAMES["compare_table"], map(_cells, rows))


def _cells(row: Row) -> tuple[str, ...]:
    if row.error:
        return row.variant, row.error

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else Message(f"{{value:{form}}}", value=value)

    share = row.above_prediction
    return (
        row.variant,
        _bits(row),
        "-" if row.weight_bytes is None else format_bytes(row.weight_bytes),
        number(row.perplexity, ",.2f"),
        number(row.kl, ".4f"),
        number(row.agreement, ".1%"),
        number(row.prefill_tps, ",.0f"),
        number(row.decode_tps, ",.1f"),
        "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        "-" if share is None else parts.deviation(share),
    )


def _bits(row: Row) -> str:
    """Per parameter, and in parentheses per quantized weight."""
    if row.bits_per_parameter is None:
        return "-"
    if row.bits_per_quantized_weight is None:
        return Message("{bits:.1f}", bits=row.bits_per_parameter)
    return Message("{bits:.1f} ({own:.2f})", bits=row.bits_per_parameter, own=row.bits_per_quantized_weight)
