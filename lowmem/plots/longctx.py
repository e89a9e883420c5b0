"""Perplexity, time and memory along a text, as curves and as a table. No torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from lowmem.longctx.strategies import Point, by_strategy
from lowmem.messages import Message, msg
from lowmem.plots.figure import COLORS, GREY, new_figure, no_data, scales, style
from lowmem.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_HEIGHT = 400, 360, 90
MOST_MARKERS = 20
_LOGARITHMIC_FROM = 8
"""Values that differ by more than this factor get a logarithmic axis."""

Curve = tuple[str, Sequence[tuple[float, float]]]
"""A name and its points (tokens, value) in their order."""


def picture(points: Sequence[Point], title: str = "", columns: int = 3) -> Figure:
    """Compare cache strategies: perplexity, time per token and cache size along the text, `columns` panels abreast."""
    panels: list[tuple[str, str, Callable[[Point], float | None], Callable[[float], str]]] = [
        (msg("Perplexity"), msg("of the previous segment; lower is better"), lambda p: p.perplexity, _number),
        (msg("Time"), msg("per token, ms"), lambda p: 1000 * (p.token_seconds or 0) or None, _number),
        (msg("Memory"), msg("of the KV cache"), lambda p: p.kv_bytes or None, format_bytes),
    ]
    found = by_strategy(points)
    rows = -(-len(panels) // columns)
    size = columns * PANEL_WIDTH, rows * PANEL_HEIGHT + LEGEND_HEIGHT
    figure = new_figure(*size, title or msg("Cache strategies for a long text"), title)
    for axes, (heading, unit, value, text) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True
    ):
        _panel(axes, [(name, _places(group, value)) for name, group in found.items()], heading, unit, text)
    lines = [line for line in figure.axes[0].get_lines() if not str(line.get_label()).startswith("_")]
    if lines:
        figure.legend(
            handles=lines, loc="outside lower left", ncols=max(1, size[0] // 200), frameon=False, labelcolor=GREY
        )
    return figure


def perplexity_sheet(places: Sequence[tuple[float, float]]) -> Figure:
    """Perplexity along one text."""
    figure = new_figure(640, 320, msg("Perplexity along the text"))
    _panel(
        figure.subplots(),
        [("", places)],
        msg("Perplexity"),
        msg("of each segment of the text; lower is better"),
        _number,
    )
    return figure


def _panel(axes: Axes, curves: Sequence[Curve], heading: str, unit: str, text: Callable[[float], str]) -> None:
    style(axes, heading, unit)
    drawn = [[(tokens, value) for tokens, value in places if math.isfinite(value)] for _, places in curves]
    values = [value for places in drawn for _, value in places]
    if not values:
        no_data(axes)
        return
    logarithmic = min(values) > 0 and max(values) > _LOGARITHMIC_FROM * min(values)
    for index, ((name, _), places) in enumerate(zip(curves, drawn, strict=True)):
        marker = "o" if len(places) <= MOST_MARKERS else ""
        across, up = zip(*places, strict=True) if places else ((), ())
        axes.plot(across, up, marker=marker, markersize=6, linewidth=2.5, color=COLORS[index % len(COLORS)], label=name)
    scales(axes, _tokens, msg("tokens read"), text, logarithmic=logarithmic)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(min(values) / 1.1 if logarithmic else 0, 1.08 * max(values))


def to_csv(points: Sequence[Point]) -> str:
    """A header and a line per point; bytes and seconds as plain numbers."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(Point)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return out.getvalue()


def _places(points: Sequence[Point], value: Callable[[Point], float | None]) -> list[tuple[float, float]]:
    return [(point.tokens, found) for point in points if (found := value(point)) is not None]


def _number(value: float) -> str:
    return Message("{value:,.4g}", value=value)


def _tokens(tokens: float) -> str:
    return f"{tokens / 1000:g}k" if tokens >= 1000 else Message("{tokens:g}", tokens=tokens)
