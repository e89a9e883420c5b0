"""Bars of an exported graph beside PyTorch, and of the offloading methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowmem.messages import Message, msg
from lowmem.plots.figure import COLORS, GREY, bars, new_figure, new_plot, style
from lowmem.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENGINES = {"torch": ("PyTorch fp32", COLORS[1]), "onnx": ("ONNX Runtime", COLORS[0])}
ROW_HEIGHT = 26


def graph_benchmark(result: Mapping[str, Any]) -> list[Figure]:
    """Prefill speed and time per token by prompt length; an encoder generates nothing and has the first only.

    Args:
        result: the last event of `lowmem.export.benchmark`.
    """
    panels = [("prefill_tps", msg("Prefill"), msg("prompt tokens/s; longer is better"), "{value:,.0f}")]
    if any(value is not None for engine in ENGINES for value in result[engine]["token_ms"]):
        panels.append(("token_ms", msg("Each new token"), msg("milliseconds; shorter is better"), "{value:.1f} ms"))
    return [_lengths(result, *panel) for panel in panels]


def _lengths(result: Mapping[str, Any], key: str, title: str, unit: str, form: str) -> Figure:
    rows = [
        (msg("{length} tokens, {name}", length=length, name=name), result[engine][key][position], color)
        for position, length in enumerate(result["prompts"])
        for engine, (name, color) in ENGINES.items()
    ]
    names, values, colors = zip(*rows, strict=True)
    figure, axes = new_plot(520, 90 + ROW_HEIGHT * len(rows), title, unit)
    labels = ["" if value is None else Message(form, value=value) for value in values]
    bars(axes, names, values, labels, colors)
    return figure


def offload_methods(
    names: Sequence[str],
    seconds: Sequence[float],
    peaks: Sequence[int],
    predicted: Sequence[int],
    texts: Sequence[str],
    title: str,
) -> Figure:
    """Time per token and peak memory of each offloading method; `texts` are the formatted times."""
    figure = new_figure(1000, 90 + 40 * len(names), title)
    time, memory = figure.subplots(1, 2)
    style(time, msg("Time per token"), msg("shorter is better"))
    bars(time, names, seconds, texts, [COLORS[0]] * len(names))
    style(memory, msg("Peak memory"), msg("measured, and predicted (line); shorter is better"))
    bars(memory, names, peaks, [format_bytes(peak) for peak in peaks], [COLORS[2]] * len(names), predicted)
    for axes in figure.axes:
        axes.tick_params(axis="y", labelcolor=GREY)
    return figure
