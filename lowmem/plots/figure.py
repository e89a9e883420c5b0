"""Matplotlib figures as SVG and PNG: transparent, with one grey that has the same contrast on white and on black.

Uses `Figure` without pyplot, which keeps global state and is not safe in the threads of a web page. One unit is a pixel:
figures have 72 dots per inch, and a PNG is twice as large in each direction. Matplotlib takes a second and 30 MB, so it is
imported when the first figure is drawn.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem.messages import msg, translate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#7a7a7a"
FAINT = "#7a7a7a55"
COLORS = ("#4c8bd6", "#d9822b", "#3fa36b", "#a66bc9", "#d0596a", "#2fa3b0", "#a8862f", "#7f86c9", "#c66a9e", "#6f9a3e")
"""Of medium lightness, so that they are visible on white and on black."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
NO_DATA = msg("no figures")

_PNG_SCALE = 2
_LOCK = threading.Lock()
"""Matplotlib's settings are global to the process."""


def new_figure(width: int, height: int, title: str, heading: str = "") -> Figure:
    """An empty figure of this size in pixels; `title` is its accessible name, `heading` a line drawn above it."""
    from matplotlib.figure import Figure

    figure = Figure((width / 72, height / 72), dpi=72, layout="constrained", facecolor="none")
    figure.set_label(title)
    figure.get_layout_engine().set(w_pad=14 / 72, h_pad=10 / 72, wspace=0.03)  # type: ignore[union-attr, call-arg]
    if heading:
        figure.suptitle(heading, x=0.012, ha="left", fontsize=18, fontweight="bold", color=GREY)
    return figure


def style(axes: Axes, title: str, unit: str) -> None:
    """Give `axes` a title with its unit below, and remove everything that is not needed to read it."""
    axes.set_facecolor("none")
    axes.set_title(title, loc="left", pad=26, fontsize=15, fontweight="bold", color=GREY)
    axes.annotate(
        unit, (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", color=GREY, fontsize=12
    )
    axes.tick_params(colors=GREY, length=3, labelsize=12)
    for side, spine in axes.spines.items():
        spine.set_color(GREY)
        spine.set_visible(side == "bottom")


def new_plot(width: int, height: int, title: str, unit: str) -> tuple[Figure, Axes]:
    """A figure with a single plot, and its axes."""
    figure = new_figure(width, height, title)
    axes = figure.subplots()
    style(axes, title, unit)
    return figure, axes


def scales(
    axes: Axes, across: Callable[[float], str], label: str, up: Callable[[float], str], *, logarithmic: bool = False
) -> None:
    """Label both axes of a plot of points; horizontal lines lead from the values to the points."""
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: translate(up(value)))
        axes.tick_params(which="minor", colors=GREY, length=0, labelsize=12)
    axes.xaxis.set_major_formatter(lambda value, _: translate(across(value)))
    axes.yaxis.set_major_formatter(lambda value, _: translate(up(value)))
    axes.set_xlabel(label, color=GREY, fontsize=12)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=FAINT, linewidth=1)
    axes.set_axisbelow(True)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[float | None],
    labels: Sequence[str],
    colors: Sequence[str],
    marks: Sequence[float | None] = (),
) -> None:
    """Horizontal bars from top to bottom, one per name.

    Args:
        values: lengths; None leaves the line empty and says so.
        labels: written at the end of each bar.
        colors: one per bar; its name has the same.
        marks: second values, drawn as strokes across the bars.
    """
    marks = marks or [None] * len(values)
    largest = max((value for value in (*values, *marks) if value), default=0) or 1
    axes.set_xlim(0, 1.35 * largest)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), list(map(translate, names)), fontweight="bold", fontsize=13)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set(visible=True, color=FAINT)
    axes.tick_params(axis="y", length=0)
    for at, (value, label, color, mark) in enumerate(zip(values, labels, colors, marks, strict=True)):
        axes.get_yticklabels()[at].set_color(GREY if value is None else color)
        if value is not None:
            axes.barh(at, value, 0.55, color=color)
        if mark:
            axes.plot([mark, mark], [at - 0.4, at + 0.4], color=GREY, linewidth=2)
        text, end = (NO_DATA, 0.0) if value is None else (label, max(value, mark or 0))
        axes.annotate(text, (end, at), xytext=(7, 0), textcoords="offset points", va="center", color=GREY, fontsize=12)


def no_data(axes: Axes) -> None:
    """Say that there is nothing to plot."""
    axes.set_axis_off()
    axes.text(0, 0.95, NO_DATA, transform=axes.transAxes, va="top", color=GREY, fontsize=12)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element with text as text, to be put into a page or a file."""
    svg = _render(figure, format="svg").decode()
    svg = svg[svg.index("<svg") :]
    # Remove metadata, a style sheet that would apply to the whole page, and ids that would occur on it more than once.
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[A-Za-z0-9.]+_\d+"', "<g", svg).replace('<g id="point"', '<g class="point"')
    svg = re.sub(r"(font: [^'\";]*px )'[^;\"]*", rf"\1{FONT}", svg)
    title = escape(translate(str(figure.get_label())))
    return svg.replace("<svg ", '<svg role="img" ', 1).replace(">", f">\n <title>{title}</title>", 1)


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG of twice its size in pixels."""
    return _render(figure, format="png", dpi=72 * _PNG_SCALE)


def encode(figure: Figure, path: Path) -> str | bytes:
    """The figure in the format of `path`'s suffix: SVG for .svg, otherwise PNG."""
    return to_svg(figure) if path.suffix.lower() == ".svg" else to_png(figure)


def _texts(figure: Figure) -> list[Any]:
    return [artist for artist in figure.findobj() if hasattr(artist, "set_parse_math")]


def _render(figure: Figure, **arguments: Any) -> bytes:
    from matplotlib import rc_context

    for text in _texts(figure):
        text.set_text(translate(text.get_text()))
        text.set_parse_math(False)  # a dollar sign in a name is no formula
    out = io.BytesIO()
    with _LOCK, rc_context({"svg.fonttype": "none"}):
        figure.savefig(out, **arguments)
    return out.getvalue()
