"""Offloading as HTML: placement of the blocks, time per token, methods side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.events import Receipt
from lowmem.messages import Message, msg
from lowmem.offload.estimate import SpeedEstimate
from lowmem.planning.placement import Placement, all_resident
from lowmem.planning.plan import Plan
from lowmem.plots.engines import offload_methods
from lowmem.plots.figure import to_svg
from lowmem.ui.html import parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import escape
from lowmem.ui.names import NAMES, name
from lowmem.units import format_bytes

TIME_TOLERANCE = 0.25
FEW_TOKENS = 4
"""With fewer tokens the speed is not representative."""


def picture(plan: Plan, speed: SpeedEstimate | None, *, here: bool = True) -> str:
    """The model as a column of blocks, colored by placement, with the estimate beside it.

    Args:
        here: the model is on this machine.
    """
    return stack(plan, _prediction(plan, speed, here))


def stack(plan: Plan, beside: str) -> str:
    """The blocks of a plan as a column, with HTML beside it."""
    placement = plan.placement or all_resident(plan.spec, plan.place.kind)
    return (
        f'<section class="lm-stack"><h2>{escape(msg("Placement of the blocks"))}</h2>{_legend(placement)}'
        f'<div class="lm-stack-body">{_column(plan, placement)}<div class="lm-stack-side">{beside}</div></div>'
        f"</section>"
    )


def section(title: str, text: str) -> str:
    """The head of a part of the tab."""
    return f'<div class="lm-part"><h2>{escape(title)}</h2><p class="lm-muted">{escape(text)}</p></div>'


def _kinds(placement: Placement) -> list[str]:
    return ["mapped" if place == "disk" and placement.mapped else place for place in placement.blocks]


def _column(plan: Plan, placement: Placement) -> str:
    resident_at = "gpu" if plan.place.kind == "cuda" else "ram"
    cells = [
        f'<i data-place="{resident_at}" class="lm-end" title="{escape(msg("embedding: {place}", place=name("places", resident_at)))}"></i>'
    ]
    cells += [
        f'<i data-place="{kind}" title="{escape(msg("block {index}: {place}", index=index, place=name("places", kind)))}">{index}</i>'
        for index, kind in enumerate(_kinds(placement))
    ]
    cells.append(
        f'<i data-place="{resident_at}" class="lm-end" title="{escape(msg("head: {place}", place=name("places", resident_at)))}"></i>'
    )
    spoken = escape(placement.sentence())
    return (
        f'<div class="lm-blocks" role="img" aria-label="{spoken}" data-many="{len(cells) > 40}">{"".join(cells)}</div>'
    )


def _legend(placement: Placement) -> str:
    kinds = _kinds(placement)
    items = "".join(
        f'<li><i data-place="{kind}"></i>{escape(name("places", kind))} <b class="lm-num">{kinds.count(kind)}</b></li>'
        for kind in dict.fromkeys(kinds)
    )
    return f'<ul class="lm-places">{items}</ul>'


def _prediction(plan: Plan, speed: SpeedEstimate | None, here: bool) -> str:
    budgets = render.budget(
        plan, Message("{model} · {precision_label}", model=plan.spec.name, precision_label=plan.precision_label)
    )
    lines = [plan.reason]
    if speed is None:
        lines.append(
            msg("Measure the speed of this machine to see the time per token. It takes a few seconds.")
            if here
            else msg("The time per token is shown once the model is on this machine.")
        )
        return budgets + parts.small(*lines)
    seconds = Message(name("limits", speed.bound_by), seconds=_seconds(speed.seconds_per_token))
    if speed.disk_bytes:
        rate = format_bytes(speed.disk_rate)
        lines.append(
            msg("Reads {size} from disk per token, at {rate}/s", size=format_bytes(speed.disk_bytes), rate=rate)
        )
    return f'<p class="lm-pace"><span>{escape(msg("Time per token"))}</span><b>{escape(seconds)}</b></p>{budgets}{parts.small(*lines)}'


def _seconds(seconds: float) -> str:
    return (
        Message("{seconds:.2f} s", seconds=seconds)
        if seconds >= 0.1
        else Message("{seconds:.0f} ms", seconds=1000 * seconds)
    )


def measured(one: Receipt) -> str:
    """Predicted and measured memory and time per token."""
    bars = parts.peaks(one, lambda memory: msg("{memory} peak", memory=name("memory", memory)))
    details = one.details
    expected, taken = (details.get(key) or 0.0 for key in ("predicted_seconds_per_token", "seconds_per_token"))
    if expected and taken:
        bars += parts.against(msg("Time per token"), expected, taken, _seconds, TIME_TOLERANCE)
    read = format_bytes(details.get("bytes_read", 0))
    lines = [
        msg(
            "{placement} · {new_tokens} tokens · {read} read",
            placement=details.get("placement", ""),
            new_tokens=one.new_tokens,
            read=read,
        )
    ]
    if taken and one.new_tokens > FEW_TOKENS and abs(expected - taken) > TIME_TOLERANCE * taken:
        lines.append(msg("Speed has changed; measure again."))
    return f'<section class="lm-made">{bars}{parts.small(*lines)}</section>'


def comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a comparison, with the rows measured so far."""
    return parts.table(NAMES["offload_table"], map(_cells, rows)) if rows else ""


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    title = name("methods", row["method"])
    if "error" in row:
        return title, row["error"]
    details, peak, predicted = row["details"], row["measured"], row["predicted"]
    expected = details.get("predicted_seconds_per_token")
    return (
        title,
        _seconds(details.get("seconds_per_token", 0.0)),
        _seconds(expected) if expected else "-",
        format_bytes(peak["ram"]),
        format_bytes(predicted["ram"]) if "ram" in predicted else "-",
        format_bytes(peak["vram"]) if "vram" in peak else "-",
        format_bytes(details.get("bytes_read", 0)),
    )


def plot(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """Bars of time per token and of peak memory, a line for each method."""
    done = [row for row in rows if "error" not in row]
    if not done:
        return ""
    seconds = [row["details"].get("seconds_per_token", 0.0) for row in done]
    peaks, predicted = ([sum(row[key].values()) for row in done] for key in ("measured", "predicted"))
    names = [name("methods", row["method"]) for row in done]
    return parts.drawing(to_svg(offload_methods(names, seconds, peaks, predicted, list(map(_seconds, seconds)), title)))
