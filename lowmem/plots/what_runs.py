"""The table of what runs on which size of GPU as a picture: one colored cell per plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lowmem.messages import msg
from lowmem.planning.what_runs import SIZES_GB, Cell, by_model
from lowmem.plots.figure import COLORS, FAINT, GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, ROW_HEIGHT, MARGINS = 1100, 34, 120

LEGEND = (
    ("half", msg("half precision"), COLORS[2]),
    ("bnb8", msg("8 bits"), COLORS[0]),
    ("nf4", msg("4 bits"), COLORS[1]),
    ("offloaded", msg("offloaded, with the blocks on the GPU"), COLORS[4]),
)


def picture(cells: Sequence[Cell]) -> Figure:
    """Models from top to bottom, sizes from left to right; a cell has its precision and its range of tokens per second."""
    from matplotlib.patches import Rectangle

    rows = by_model(cells)
    title = msg("What runs on 4 to 24 GB of GPU memory, with its range of tokens per second")
    figure = new_figure(WIDTH, MARGINS + ROW_HEIGHT * len(rows), title, title)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_xlim(-0.02, len(SIZES_GB))
    axes.set_ylim(len(rows), -0.05)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.tick_top()
    axes.set_xticks(
        [index + 0.5 for index in range(len(SIZES_GB))], [f"{size} GB" for size in SIZES_GB], fontweight="bold"
    )
    axes.set_yticks([index + 0.5 for index in range(len(rows))], [row[0].model for row in rows])
    axes.tick_params(colors=GREY, length=0, labelsize=13)
    colors = {key: color for key, _, color in LEGEND}
    for down, row in enumerate(rows):
        for across, cell in enumerate(row):
            color = colors.get("offloaded" if cell.offloaded else cell.precision, colors["half"])
            axes.add_patch(Rectangle((across, down + 0.08), 0.98, 0.84, facecolor="none", edgecolor=FAINT))
            if cell.speed:
                axes.add_patch(Rectangle((across, down + 0.08), 0.05, 0.84, facecolor=color))
            axes.text(across + 0.1, down + 0.5, cell.text(), va="center", fontsize=11.5, color=GREY)
    marks = [Rectangle((0, 0), 1, 1, facecolor=color) for _, _, color in LEGEND]
    legend = figure.legend(
        marks,
        [label for _, label, _ in LEGEND],
        loc="outside lower left",
        ncols=len(LEGEND),
        frameon=False,
        fontsize=12,
    )
    for text in legend.get_texts():
        text.set_color(GREY)
    return figure
