"""A comparison as a picture: size against quality, and bars of speed and of memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence

from lowmem.measure.rows import Row
from lowmem.plots.drawing import FAINT, GREY, Bar, Dot, Label, Line, Shape, Sheet
from lowmem.units import format_bytes

COLORS = ("#4c8bd6", "#d9822b", "#3fa36b", "#a66bc9", "#d0596a", "#2fa3b0", "#a8862f", "#7f86c9", "#c66a9e", "#6f9a3e")
"""Of medium lightness, so that they stand out on white and on black; a variant keeps its colour in all panels."""

WIDTH, MARGIN, GAP = 1200, 28, 44
TITLE_HEIGHT, LEAST_PLOT_HEIGHT = 84, 250
ROW_HEIGHT, LARGEST_ROW_HEIGHT = 34, 56
BAR_HEIGHT = 18
SCATTER_WIDTH = 430
LEAST_SPAN = 1.15

Colored = tuple[Row, str]


def picture(rows: Sequence[Row], title: str = "", text: str = "") -> Sheet:
    """Draw a comparison; `title` names the model, `text` what its quality was measured on.

    Variants that failed keep their line among the bars, without one.
    """
    colored = [(row, COLORS[index % len(COLORS)]) for index, row in enumerate(rows)]
    height = max(LEAST_PLOT_HEIGHT, ROW_HEIGHT * len(rows) + 10)
    bars = (WIDTH - 2 * MARGIN - SCATTER_WIDTH - 2 * GAP) / 2
    left, top = MARGIN + SCATTER_WIDTH + GAP, TITLE_HEIGHT
    shapes: list[Shape] = [Label(MARGIN, 24, title, 18, bold=True)] if title else []
    shapes += _scatter(colored, MARGIN, top, SCATTER_WIDTH, height, f"perplexity on {text}" if text else "perplexity")
    shapes += _speeds(colored, left, top, bars)
    shapes += _memories(colored, left + bars + GAP, top, bars)
    return Sheet(WIDTH, TITLE_HEIGHT + height + 56, tuple(shapes), title or "Comparison of variants")


def _scatter(rows: Sequence[Colored], x: float, y: float, width: float, height: float, unit: str) -> Iterator[Shape]:
    """Size of the weights to the right, perplexity upwards: the best are at the lower left."""
    yield from _heading("Size and quality", f"{unit}; smaller is better", x, y)
    points = [
        (row.variant, row.weight_bytes, row.perplexity, color)
        for row, color in rows
        if row.weight_bytes and row.perplexity and math.isfinite(row.perplexity)
    ]
    if not points:
        yield Label(x, y + 24, "no figures", 12)
        return
    left, right, bottom = x + 44, x + width, y + height
    across = _Axis([0.0, max(size for _, size, _, _ in points) * 1.12], left, right)
    qualities = [quality for _, _, quality, _ in points]
    up = _Axis(_padded(qualities), bottom, y + 8, logarithmic=max(qualities) > 10 * min(qualities))
    for value in up.ticks():
        yield Line(left, up(value), right, up(value))
        yield Label(left - 8, up(value), f"{value:,.4g}", 12, "end")
    for value in across.ticks():
        yield Line(across(value), bottom, across(value), bottom + 4, GREY)
        yield Label(across(value), bottom + 17, format_bytes(value) if value else "0", 12, "middle")
    yield Line(left, bottom, right, bottom, GREY)
    yield Label((left + right) / 2, bottom + 40, "loaded weights", 12, "middle")
    for _, size, quality, color in points:
        yield Dot(across(size), up(quality), 6, color)
    yield from _names([(across(size), up(quality), name, color) for name, size, quality, color in points], right)


def _names(points: Sequence[tuple[float, float, str, str]], right: float) -> Iterator[Shape]:
    """A name beside every dot, above or below it where another is in the way."""
    taken: list[tuple[float, float, float]] = [(x - 7, x + 7, y) for x, y, _, _ in points]
    for x, y, name, color in sorted(points):
        length = 7.2 * len(name)
        for side, dy in ((1, 0), (-1, 0), (1, -15), (1, 15), (-1, -15), (-1, 15), (1, -30), (1, 30)):
            start = x + 11 if side > 0 else x - 11 - length
            free = all(start + length < a or start > b or abs(y + dy - at) > 12 for a, b, at in taken)
            if free and start + length <= right + 8:
                break
        taken.append((start, start + length, y + dy))
        yield Label(start, y + dy, name, 13, color=color, bold=True)


def _speeds(rows: Sequence[Colored], x: float, y: float, width: float) -> Iterator[Shape]:
    yield from _heading("Speed", "new tokens a second (prefill in brackets); longer is better", x, y)
    largest = max((row.decode_tps or 0 for row, _ in rows), default=0) or 1
    for (row, color), at in _lines(rows, y):
        start, room = yield from _named(row, color, x, at, width, rows)
        if row.decode_tps is None:
            yield Label(start + 6, at, "no figures", 12)
            continue
        length = room * row.decode_tps / largest
        prefill = f" ({row.prefill_tps:,.0f})" if row.prefill_tps else ""
        yield Bar(start, at - BAR_HEIGHT / 2, length, BAR_HEIGHT, color)
        yield Label(start + length + 6, at, f"{row.decode_tps:,.1f}{prefill}", 12)


def _memories(rows: Sequence[Colored], x: float, y: float, width: float) -> Iterator[Shape]:
    on_gpu = any(row.predicted_vram_bytes is not None for row, _ in rows)
    memory = "GPU memory" if on_gpu else "RAM"
    yield from _heading("Peak memory", f"{memory} measured, and predicted (stroke); shorter is better", x, y)
    largest = max((max(row.peak_bytes or 0, row.predicted_bytes or 0) for row, _ in rows), default=0) or 1
    for (row, color), at in _lines(rows, y):
        start, room = yield from _named(row, color, x, at, width, rows)
        if row.peak_bytes is None:
            yield Label(start + 6, at, "no figures", 12)
            continue
        length, predicted = room * row.peak_bytes / largest, room * (row.predicted_bytes or 0) / largest
        yield Bar(start, at - BAR_HEIGHT / 2, length, BAR_HEIGHT, color)
        yield Line(start + predicted, at - BAR_HEIGHT / 2 - 4, start + predicted, at + BAR_HEIGHT / 2 + 4, GREY, 2)
        yield Label(start + max(length, predicted) + 8, at, format_bytes(row.peak_bytes), 12)


def _heading(title: str, unit: str, x: float, y: float) -> Iterator[Shape]:
    yield Label(x, y - 32, title, 15, bold=True)
    yield Label(x, y - 13, unit, 12)


def _lines(rows: Sequence[Colored], y: float) -> Iterator[tuple[Colored, float]]:
    return ((row, y + 8 + _row_height(len(rows)) * (index + 0.5)) for index, row in enumerate(rows))


def _row_height(count: int) -> float:
    return min(LARGEST_ROW_HEIGHT, max(ROW_HEIGHT, LEAST_PLOT_HEIGHT / count))


def _named(
    row: Row, color: str, x: float, y: float, width: float, rows: Sequence[Colored]
) -> Generator[Shape, None, tuple[float, float]]:
    """The variant's name; returns where its bar starts and the room for the longest, figures beside it allowed for."""
    column = 7.4 * max(len(other.variant) for other, _ in rows) + 12
    yield Label(x + column - 10, y, row.variant, 13, "end", color if not row.error else GREY, bold=True)
    half = _row_height(len(rows)) / 2
    yield Line(x + column, y - half, x + column, y + half, FAINT)
    return x + column, width - column - 84


def _padded(values: Sequence[float]) -> list[float]:
    """The span of `values` with room around, and never so narrow that a difference of 1 % looks like much."""
    low, high = min(values), max(values)
    high = max(high, LEAST_SPAN * low)
    room = 0.12 * (high - low)
    return [max(low - room, low / 1.1), high + room]


class _Axis:
    """Numbers to pixels, evenly or by their logarithm, with round ticks."""

    def __init__(self, span: Sequence[float], start: float, end: float, logarithmic: bool = False) -> None:
        self._low, self._high = min(span), max(span)
        self._start, self._end = start, end
        self._log = logarithmic

    def __call__(self, value: float) -> float:
        low, high = self._scaled(self._low), self._scaled(self._high)
        return self._start + (self._scaled(value) - low) / (high - low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        if self._log:
            powers = range(math.floor(math.log10(self._low)), math.ceil(math.log10(self._high)) + 1)
            candidates = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        else:
            step = _round_step((self._high - self._low) / 5)
            candidates = [
                step * number for number in range(math.ceil(self._low / step), math.floor(self._high / step) + 1)
            ]
        return [value for value in candidates if self._low <= value <= self._high]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
