"""A comparison as a picture: size against quality, and bars of speed and of memory. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem.measure.rows import Row
from lowmem.messages import Message, msg
from lowmem.plots.figure import COLORS, GREY, bars, new_figure, no_data, scales, style
from lowmem.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, PLOT_HEIGHT, ROW_HEIGHT, MARGINS = 1200, 260, 34, 150

LEAST_SPAN = 1.15
"""The axis of perplexity is never narrower, so that a difference of 1 % does not look large."""


def picture(rows: Sequence[Row], title: str = "", text: str = "") -> Figure:
    """Plot a comparison. A variant has one color in all panels; one that failed has a line without a bar.

    Args:
        title: name of the model.
        text: what the quality was measured on.
    """
    height = MARGINS + max(PLOT_HEIGHT, ROW_HEIGHT * len(rows))
    figure = new_figure(WIDTH, height, title or msg("Comparison of variants"), title)
    quality, speed, memory = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
    colors = [COLORS[index % len(COLORS)] for index in range(len(rows))]
    names = [row.variant for row in rows]
    _quality(quality, rows, colors, msg("perplexity on {text}", text=text) if text else "perplexity")

    style(speed, msg("Speed"), msg("new tokens/s (prefill in brackets); longer is better"))
    prefill = [Message(" ({prefill_tps:,.0f})", prefill_tps=row.prefill_tps) if row.prefill_tps else "" for row in rows]
    tps = [row.decode_tps for row in rows]
    labels = [Message("{one:,.1f}{more}", one=one or 0, more=more) for one, more in zip(tps, prefill, strict=True)]
    bars(speed, names, tps, labels, colors)

    on_gpu = any(row.predicted_vram_bytes is not None for row in rows)
    style(
        memory,
        msg("Peak memory"),
        msg("GPU memory measured, and predicted (line); shorter is better")
        if on_gpu
        else msg("RAM measured, and predicted (line); shorter is better"),
    )
    peaks = [row.peak_bytes for row in rows]
    predicted = [row.predicted_bytes if row.peak_bytes else None for row in rows]
    bars(memory, names, peaks, [format_bytes(peak or 0) for peak in peaks], colors, predicted)
    return figure


def _quality(axes: Axes, rows: Sequence[Row], colors: Sequence[str], unit: str) -> None:
    """Size of the weights to the right, perplexity upwards: the best variants are at the lower left."""
    style(axes, msg("Size and quality"), msg("{unit}; smaller is better", unit=unit))
    points = [
        (row.weight_bytes, row.perplexity, row.variant, color)
        for row, color in zip(rows, colors, strict=True)
        if row.weight_bytes and row.perplexity and math.isfinite(row.perplexity)
    ]
    if not points:
        no_data(axes)
        return
    low, high = (pick(perplexity for _, perplexity, _, _ in points) for pick in (min, max))
    scales(
        axes,
        lambda size: format_bytes(size) if size else "0",
        msg("loaded weights"),
        lambda perplexity: Message("{perplexity:,.4g}", perplexity=perplexity),
        logarithmic=high > 10 * low,
    )
    high = max(high, LEAST_SPAN * low)
    axes.set_xlim(0, 1.3 * max(size for size, *_ in points))
    axes.set_ylim(max(low - 0.12 * (high - low), low / 1.1), high + 0.12 * (high - low))
    axes.locator_params(axis="x", nbins=5)
    for size, perplexity, _, color in points:
        axes.plot(size, perplexity, "o", markersize=11, color=color, gid="point", clip_on=False)
    _names(axes, points)


def _names(axes: Axes, points: Sequence[tuple[int, float, str, str]]) -> None:
    """A name to the right of every point, moved up where another name is in the way."""
    heights: list[tuple[float, float, float]] = []
    width, height = axes.bbox.width or 1, axes.bbox.height or 1
    for size, perplexity, name, color in sorted(points):
        x, y = axes.transLimits.transform(axes.transScale.transform((size, perplexity)))
        left, right, at = x * width, x * width + 8 * len(name) + 16, y * height
        shift = 0.0
        while any(left < b and right > a and abs(at + shift - other) < 14 for a, b, other in heights):
            shift += 7
        heights.append((left, right, at + shift))
        axes.annotate(
            name, (size, perplexity), xytext=(10, shift), textcoords="offset points", va="center",
            color=color or GREY, fontsize=13, fontweight="bold",
        )  # fmt: skip
