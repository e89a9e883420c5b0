"""Formatting and parsing of sizes and durations."""

from __future__ import annotations

import re

from lowmem.errors import BadInput

KB, MB, GB = 10**3, 10**6, 10**9
KiB, MiB, GiB = 2**10, 2**20, 2**30

_SUFFIXES = {"": 1, "K": KB, "M": MB, "G": GB, "T": 10**12, "KI": KiB, "MI": MiB, "GI": GiB, "TI": 2**40}


def format_bytes(count: int | float) -> str:
    """`1_234_000_000 -> "1.23 GB"`, three significant digits, decimal units."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    for unit, scale in (("GB", GB), ("MB", MB), ("KB", KB)):
        if size >= 0.9995 * scale:
            value = size / scale
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{sign}{value:.{digits}f} {unit}"
    return f"{sign}{size:.0f} B"


def parse_bytes(text: str | int | float) -> int:
    """`"4G" -> 4_000_000_000`; also K, M, T, their binary forms (`4Gi`), and plain bytes.

    Raises:
        BadInput: not a size.
    """
    if isinstance(text, (int, float)):
        return int(text)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I":
        raise BadInput(f"{text!r} is not a size.", "Write it like 4G, 512M or 1.5G.")
    return int(float(match[1]) * _SUFFIXES[match[2]])


def format_seconds(seconds: float) -> str:
    """`75 -> "1 min 15 s"`, `0.42 -> "0.4 s"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
