"""Curves along a text: perplexity, time and memory against its length; and their table. No torch."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from lowmem.longctx.strategies import Point, by_strategy
from lowmem.plots.drawing import GREY, Bar, Dot, Label, Line, Shape, Sheet
from lowmem.plots.variants import COLORS, FAINT, _Axis
from lowmem.units import format_bytes

PANEL_WIDTH, PLOT_HEIGHT, PANEL_HEIGHT = 335, 250, 360
MARGIN, GAP, TOP = 28, 70, 126
LEGEND_STEP = 24
_LOGARITHMIC_FROM = 8
"""Values that differ by more than this factor are drawn on a logarithmic axis."""

Places = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line through places (tokens, value) in their order."""

    name: str
    color: str
    places: Places


def picture(points: Sequence[Point], title: str = "", columns: int = 3) -> Sheet:
    """The exercise: perplexity, time for a token and memory of the cache along the text, `columns` panels abreast."""
    panels: list[tuple[str, str, Callable[[Point], float | None], Callable[[float], str]]] = [
        ("Perplexity", "of the stretch before; smaller is better", lambda p: p.perplexity, lambda v: f"{v:,.4g}"),
        ("Time", "for one more token, ms", lambda p: 1000 * (p.token_seconds or 0) or None, lambda v: f"{v:,.4g}"),
        ("Memory", "of keys and values", lambda p: p.kv_bytes or None, format_bytes),
    ]
    strategies = list(by_strategy(points).items())
    width = 2 * MARGIN + columns * PANEL_WIDTH + (columns - 1) * GAP
    shapes: list[Shape] = [Label(MARGIN, 24, title, 18, bold=True)] if title else []
    legend, height = _legend([name for name, _ in strategies], 54, width)
    shapes += legend
    for number, (heading, unit, value, shown) in enumerate(panels):
        curves = [
            Curve(name, COLORS[index % len(COLORS)], _places(found, value))
            for index, (name, found) in enumerate(strategies)
        ]
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (PANEL_WIDTH + GAP), TOP + height + row * PANEL_HEIGHT
        shapes += panel(curves, x, y, PANEL_WIDTH, PLOT_HEIGHT, heading, unit, shown)
    rows = -(-len(panels) // columns)
    return Sheet(width, TOP + height + rows * PANEL_HEIGHT - 40, tuple(shapes), title or "Ways to read a long text")


def perplexity_sheet(places: Places) -> Sheet:
    """Perplexity along one text."""
    curve, unit = Curve("", COLORS[0], places), "of each stretch of the text; smaller is better"
    shapes = panel([curve], 0, 44, 620, 220, "Perplexity", unit, lambda value: f"{value:,.4g}")
    return Sheet(640, 320, tuple(shapes), "Perplexity along the text")


def panel(
    curves: Sequence[Curve],
    x: float,
    y: float,
    width: float,
    height: float,
    heading: str,
    unit: str,
    shown: Callable[[float], str],
) -> Iterator[Shape]:
    """Curves over tokens, with axes."""
    yield Label(x, y - 36, heading, 15, bold=True)
    yield Label(x, y - 17, unit, 12)
    places = [place for curve in curves for place in curve.places if math.isfinite(place[1])]
    if not places:
        yield Label(x, y + 24, "no figures", 12)
        return
    left, right, bottom = x + 60, x + width, y + height
    across = _Axis([0.0, max(token for token, _ in places)], left, right)
    values = [value for _, value in places]
    logarithmic = min(values) > 0 and max(values) > _LOGARITHMIC_FROM * min(values)
    low = min(values) / 1.1 if logarithmic else 0.0
    up = _Axis([low, 1.08 * max(values)], bottom, y + 6, logarithmic=logarithmic)
    for value in up.ticks():
        yield Line(left, up(value), right, up(value), FAINT)
        yield Label(left - 8, up(value), shown(value), 12, "end")
    for value in across.ticks():
        yield Line(across(value), bottom, across(value), bottom + 4, GREY)
        yield Label(across(value), bottom + 17, _short(value), 12, "middle")
    yield Line(left, bottom, right, bottom, GREY)
    yield Label((left + right) / 2, bottom + 38, "tokens read", 12, "middle")
    for curve in curves:
        drawn = [(across(token), up(value)) for token, value in curve.places if math.isfinite(value)]
        for (x0, y0), (x1, y1) in itertools.pairwise(drawn):
            yield Line(x0, y0, x1, y1, curve.color, 2.5)
        for px, py in drawn if len(drawn) <= 20 else ():
            yield Dot(px, py, 3.5, curve.color)


def to_csv(points: Sequence[Point]) -> str:
    """A header and a line per point; bytes and seconds as plain numbers."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return out.getvalue()


def _places(points: Sequence[Point], value: Callable[[Point], float | None]) -> Places:
    return [(point.tokens, found) for point in points if (found := value(point)) is not None]


def _legend(names: Sequence[str], y: int, width: float) -> tuple[list[Shape], int]:
    """A coloured box and a name each, in lines; and the height that more than one line takes."""
    shapes: list[Shape] = []
    x, top = float(MARGIN), y
    for index, name in enumerate(names):
        room = 26 + 7.4 * len(name) + 24
        if x > MARGIN and x + room > width:
            x, y = float(MARGIN), y + LEGEND_STEP
        shapes += [Bar(x, y - 6, 18, 12, COLORS[index % len(COLORS)]), Label(x + 26, y, name, 13)]
        x += room
    return shapes, y - top


def _short(tokens: float) -> str:
    return f"{tokens / 1000:g}k" if tokens >= 1000 else f"{tokens:g}"
