"""Plans for machines that are not here as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from lowmem.messages import msg
from lowmem.planning.described import DescribedPlan
from lowmem.planning.what_runs import SIZES_GB, Cell, by_model
from lowmem.ui.html import offload, parts
from lowmem.ui.html import plan as render
from lowmem.ui.language import escape


def card(found: DescribedPlan) -> str:
    """Model, precision, speed and split, and that it cannot be run here; memory and blocks below."""
    plan, speed = found.plan, found.speed
    facts = [
        (msg("Precision"), plan.precision_label),
        (msg("Context"), msg("{context:,} tokens", context=plan.context)),
        (msg("Expected speed"), speed.short() if speed else msg("doesn't fit")),
        (msg("Blocks"), found.placement.sentence() if speed else msg("doesn't fit")),
    ]
    bound = msg("Limited by {bound_by}.", bound_by=speed.bound_by) if speed else ""
    over = render.why(plan) if not speed else ""
    return (
        f'<section class="lm-card" data-verdict="{plan.verdict}"><p class="lm-eyebrow">{escape(plan.hardware.line())}</p>'
        f'<h2 class="lm-model">{escape(plan.spec.name)}</h2><p class="lm-reason">{escape(plan.reason)}</p>'
        f"{parts.facts(facts)}{over}{parts.small(bound, plan.place.note)}"
        f'<p class="lm-elsewhere" role="note">{escape(found.not_here)}</p></section>'
        f"{offload.stack(plan, render.budget(plan))}"
    )


def table(cells: Sequence[Cell]) -> str:
    """Models by size of GPU, with precision and tokens per second."""
    header = (msg("Model"), *(f"{size} GB" for size in SIZES_GB))
    rows = ((row[0].model, *(cell.text() for cell in row)) for row in by_model(cells))
    note = msg(
        "Precision and tokens per second, from slow to fast. Where blocks are offloaded, how many stay on the GPU instead of the precision."
    )
    return parts.table(header, rows) + parts.small(note)
