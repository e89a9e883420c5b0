"""Formatting and parsing of sizes and durations."""

from __future__ import annotations

import math
import re

from lowmem.errors import BadInput
from lowmem.messages import Message, msg

KB, MB, GB = 10**3, 10**6, 10**9
KiB, MiB, GiB = 2**10, 2**20, 2**30

_SUFFIXES = {"": 1, "K": KB, "M": MB, "G": GB, "T": 10**12, "KI": KiB, "MI": MiB, "GI": GiB, "TI": 2**40}


def format_bytes(count: int | float) -> str:
    """`1_234_000_000 -> "1.23 GB"`, three significant digits, decimal units."""
    size = abs(count)
    for unit, scale in (("GB", GB), ("MB", MB), ("KB", KB)):
        if size >= 0.9995 * scale:
            value = size / scale
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return Message(f"{{size:.{digits}f}} {unit}", size=count / scale)
    return Message("{size:.0f} B", size=count)


LARGEST_SIZE = 2**62


def parse_bytes(text: str | int | float) -> int:
    """`"4G" -> 4_000_000_000`; also K, M, T, their binary forms (`4Gi`), and plain bytes.

    Raises:
        BadInput: not a size.
    """
    if isinstance(text, (int, float)) and 0 <= text < LARGEST_SIZE:
        return int(text)
    text = text if isinstance(text, str) else "This number"  # too many digits to write
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?)B?\s*", text[:60].upper())
    if not match or match[2] == "I":
        text = text[:40]
        raise BadInput(msg("{text!r} is not a size.", text=text), msg("Write it like 4G, 512M or 1.5G."))
    return int(float(match[1]) * _SUFFIXES[match[2]])


def format_seconds(seconds: float) -> str:
    """`75 -> "1 min 15 s"`, `0.42 -> "0.4 s"`."""
    if seconds < 60:
        return Message("{seconds:.1f} s", seconds=seconds)
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return msg("{minutes} min {rest} s", minutes=minutes, rest=rest)
    hours, minutes = divmod(minutes, 60)
    return msg("{hours} h {minutes} min", hours=hours, minutes=minutes)


ACCURACY = 1.25
"""Estimated times are right within this factor on a quiet machine."""


def format_time_range(seconds: float) -> str:
    """The range of an estimated time: `150 -> "2 to 4 min"`, `40 -> "30 to 50 s"`, `5 -> "less than 10 s"`."""
    if seconds * ACCURACY <= 10:
        return msg("less than 10 s")
    unit, size = next((unit, size) for unit, size, most in _STEPS if seconds < most)
    low, high = (math.floor(seconds / ACCURACY / size), math.ceil(seconds * ACCURACY / size))
    step = 10 if unit == "s" else 1
    return msg("{low} to {high} {unit}", low=max(1, low) * step, high=high * step, unit=unit)


_STEPS = (("s", 10, 90), ("min", 60, 90 * 60), ("h", 3600, math.inf))
"""A unit, the seconds to which a range is rounded, and the seconds from which the next unit is used."""
