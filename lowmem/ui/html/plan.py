"""Plans, meters and receipts as HTML. Pure functions of data; everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from lowmem.events import Chunk, Completion, Receipt, Step
from lowmem.generate.window_limits import UNBOUNDED
from lowmem.machine.monitor import Snapshot
from lowmem.planning.fallback import remedies
from lowmem.planning.plan import Line, MemoryEstimate, Plan
from lowmem.precisions import PRECISIONS
from lowmem.ui.html import parts
from lowmem.ui.i18n.strings import name, say
from lowmem.units import format_bytes, format_seconds

ROWS_SHOWN = 200

LOGO = (
    '<svg viewBox="0 0 32 20" width="40" height="25" aria-hidden="true">'
    '<rect class="a" width="15" height="20" rx="3"/><rect class="b" x="17" width="6" height="20" rx="2"/>'
    '<rect class="c" x="25" y="0.5" width="6.5" height="19" rx="2"/></svg>'
)


def header() -> str:
    return f'<header class="lm-header" lang="en">{LOGO}<h1>{escape(say("title"))}</h1><p>{escape(say("tagline"))}</p></header>'


# --- budgets


def budget(plan: Plan, caption: str = "") -> str:
    """Every budget of a plan as a stacked bar, the computing device's first and with its legend open; the verdict."""
    others = [one for one in plan.estimates if one is not plan.main]
    bars = "".join(_budget_bar(one, opened=one is plan.main) for one in (plan.main, *others))
    return (
        f'<section class="lm-budget" data-verdict="{plan.verdict}">'
        f'<div class="lm-head"><h2>{escape(say("budget"))}</h2>{parts.pill(plan.verdict)}</div>'
        f'{parts.small(caption)}{bars}<p class="lm-sentence" role="status">{escape(plan.sentence())}</p></section>'
    )


def _budget_bar(one: MemoryEstimate, *, opened: bool) -> str:
    memory, lines = name("memory", one.memory), _merged(one)
    scale = max(one.peak, one.limit, 1)
    segments = "".join(
        f'<span class="lm-seg" data-share="{escape(line.key)}" style="width:{parts.percent(line.count, scale)}"></span>'
        for line in lines
    )
    spoken = ", ".join(f"{name('shares', line.key)} {format_bytes(line.count)}" for line in lines)
    label = f"{format_bytes(one.peak)} of {format_bytes(one.limit)} {memory}: {spoken}"
    limit = f'<i class="lm-limit" style="left:{parts.percent(one.limit, scale)}"></i>' if one.peak > one.limit else ""
    rows = "".join(_legend_row(line.key, line.count, line.why) for line in lines)
    rows += _legend_row("free", max(0, one.limit - one.peak), "")
    return (
        f'<details class="lm-one-budget"{" open" if opened else ""}><summary>{_of(memory, one.peak, one.limit)}'
        f'<div class="lm-bar" role="img" aria-label="{escape(label)}">{segments}{limit}</div></summary>'
        f'<ul class="lm-legend">{rows}</ul></details>'
    )


def _merged(one: MemoryEstimate) -> list[Line]:
    """One line per share, in the order of their first appearance."""
    merged: dict[str, Line] = {}
    for line in one.lines:
        if line.count > 0:
            before = merged.get(line.key, Line(line.key, 0, ""))
            merged[line.key] = Line(line.key, before.count + line.count, f"{before.why} {line.why}".strip())
    return list(merged.values())


def _of(label: str, part: int, whole: int) -> str:
    numbers = f'{format_bytes(part)} <span class="lm-muted">of {format_bytes(whole)}</span>'
    return parts.bar_title(label, f'<span class="lm-num">{numbers}</span>')


def _legend_row(key: str, count: int, why: str) -> str:
    tip = f' tabindex="0" data-tip="{escape(why)}" title="{escape(why)}"' if why else ""
    return (
        f'<li{tip}><i class="lm-dot" data-share="{escape(key)}"></i><span>{escape(name("shares", key))}</span>'
        f'<b class="lm-num">{format_bytes(count)}</b></li>'
    )


# --- the set-up


def setup_card(plan: Plan, *, recommended: bool, download: int, disk_free: int) -> str:
    """The set-up that would be loaded, with its reason and what has to be fetched."""
    eyebrow = say("recommended") if recommended else say("chosen")
    on_onnx = plan.backend == "onnx"
    facts = [
        (say("precision"), plan.precision if on_onnx else PRECISIONS[plan.precision].label),
        (say("context"), f"{plan.context:,} tokens"),
        (say("device"), f"{plan.place.name}, ONNX Runtime" if on_onnx else plan.place.name),
        (name("memory", plan.main.memory), f"{format_bytes(plan.main.peak)} of {format_bytes(plan.main.limit)}"),
    ]
    if download == 0:
        fetch = say("on_disk")
    elif download:
        fetch = f"{say('download', size=format_bytes(download))}, {say('disk_free', size=format_bytes(disk_free))}"
    else:
        fetch = say("disk_free", size=format_bytes(disk_free))
    licence = f" · {plan.spec.licence}" if plan.spec.licence else ""
    over = _why(plan) if plan.verdict == "over" else ""
    detail = f' <small class="lm-muted">{escape(plan.spec.source.detail)}</small>' if plan.spec.source.detail else ""
    return (
        f'<section class="lm-card" data-verdict="{plan.verdict}"><p class="lm-eyebrow">{escape(eyebrow)}</p>'
        f'<h2 class="lm-model">{escape(plan.spec.name)}{detail}</h2><p class="lm-reason">{escape(plan.reason)}</p>'
        f'{parts.facts(facts)}{over}<p class="lm-muted lm-small">{escape(fetch + licence)}</p></section>'
    )


def _why(plan: Plan) -> str:
    """Why a plan is over its budget, and which single change would bring it within."""
    fixes = [f"{lower.reason} {format_bytes(lower.main.peak)}." for lower in remedies(plan)]
    listed = "".join(f"<li>{escape(fix)}</li>" for fix in fixes)
    instead = f'<div class="lm-fixes"><p>{escape(say("remedies"))}</p><ul>{listed}</ul></div>' if fixes else ""
    return f'<p class="lm-why">{escape(plan.sentence())}</p>{instead}'


def unknown_card(ref: str) -> str:
    """The place of a set-up that could not be planned."""
    return (
        f'<section class="lm-card"><p class="lm-eyebrow">{escape(say("chosen"))}</p>'
        f'<h2 class="lm-model">{escape(ref[:80])}</h2></section>'
    )


def refusals(items: Sequence[tuple[str, str]], heading: str = "") -> str:
    """A quiet list of (what, why not), nothing for none."""
    head = f'<p class="lm-eyebrow">{escape(heading)}</p>' if heading else ""
    return head + parts.pairs(items) if items else ""


def slim(plan: Plan, receipt: Receipt | None) -> str:
    """The resident model in one line."""
    memory = plan.main.memory
    measured = receipt.measured.get(memory) if receipt else None
    size = format_bytes(measured or plan.main.peak)
    device = device_label(plan.device) + (", ONNX Runtime" if plan.backend == "onnx" else "")
    items = [plan.precision, device, f"{plan.context:,} tokens", f"{size} {name('memory', memory)}"]
    rest = "".join(f"<span>{escape(part)}</span>" for part in items)
    return f'<div class="lm-slim"><i class="lm-lamp"></i><strong>{escape(plan.spec.name)}</strong>{rest}</div>'


def device_label(key: str) -> str:
    return {"cpu": "CPU", "mps": "Apple GPU"}.get(key, "GPU" if key.startswith("cuda") else key)


def progress(step: Step) -> str:
    """A step as a thin bar; without a total it only moves. Counts are shown if they have a unit."""
    counted = ""
    if step.total > 0 and step.unit:
        done, total = (format_bytes(n) if step.unit == "B" else f"{n:,}" for n in (step.done, step.total))
        counted = f"{done} of {total}" + (f" {step.unit}" if step.unit != "B" else "")
    elif step.total > 0:
        counted = f"{step.done / step.total:.0%}"
    width = parts.percent(min(step.done, step.total), step.total) if step.total > 0 else "100%"
    known = "true" if step.total > 0 else "false"
    title = parts.bar_title(step.note, f'<span class="lm-num lm-muted">{escape(counted)}</span>')
    return f'<div class="lm-progress" data-known="{known}" role="status">{title}{parts.track("", ("", width))}</div>'


# --- the machine


def machine(line: str) -> str:
    return f'<p class="lm-machine">{escape(line)}</p>'


def meters(now: Snapshot) -> str:
    """RAM, GPU memory and disk as they are now."""
    rows = [_meter(name("memory", "ram"), now.ram_used, now.ram_total, now.process_bytes)]
    rows += [_meter(label, used, total) for label, used, total in now.vram]
    free = say("disk_free", size=format_bytes(now.disk_free))
    rows.append(f'<p class="lm-muted lm-small">{escape(free)}</p>')
    return f'<section class="lm-meters"><h2>{escape(say("live"))}</h2>{"".join(rows)}</section>'


def _meter(label: str, used: int, total: int, own: int = 0) -> str:
    mine = f"{format_bytes(own)} by lowmem" if own else ""
    spoken = f"{label}: {format_bytes(used)} of {format_bytes(total)} in use{', ' + mine if mine else ''}"
    bar = parts.track(spoken, ("lm-own", parts.percent(own, total)), ("", parts.percent(max(0, used - own), total)))
    note = f'<p class="lm-muted lm-small">{escape(mine)}</p>' if mine else ""
    return f'<div class="lm-meter">{_of(label, used, total)}{bar}{note}</div>'


def resident(plan: Plan | None, busy: str) -> str:
    """The resident model, and what is going on."""
    if plan is None:
        body = f'<p class="lm-muted lm-small">{escape(say("nothing_resident"))}</p>'
    else:
        facts = f"{plan.precision} · {device_label(plan.device)} · {plan.context:,} tokens"
        body = (
            f'<p><strong>{escape(plan.spec.name)}</strong></p><p class="lm-muted lm-small lm-num">{escape(facts)}</p>'
        )
    now = f'<p class="lm-busy lm-small">{escape(busy)}</p>' if busy else ""
    return f'<section class="lm-resident"><h2>{escape(say("resident"))}</h2>{body}{now}</section>'


# --- receipts


def receipt(one: Receipt | None) -> str:
    """Predicted and measured memory, then the other numbers and the notes."""
    title = f"<h2>{escape(say('receipt'))}</h2>"
    if one is None:
        return (
            f'<section class="lm-receipt">{title}<p class="lm-muted lm-small">{escape(say("no_receipt"))}</p></section>'
        )
    bars = parts.peaks(one, lambda memory: f"{name('memory', memory)} peak")
    what = parts.small(f"{one.action} · {one.model} · {one.precision}")
    return (
        f'<section class="lm-receipt">{title}{what}{bars}{parts.stats(_facts(one))}{parts.notes(one.notes)}</section>'
    )


def _facts(one: Receipt) -> list[tuple[str, str]]:
    facts = [("time", format_seconds(one.seconds))]
    if one.new_tokens:
        facts.append(("new tokens", f"{one.new_tokens:,}"))
    if one.decode_tps:
        facts.append(("decode", f"{one.decode_tps:.1f} tok/s"))
    if one.prefill_tps:
        facts.append(("prefill", f"{one.prefill_tps:.0f} tok/s"))
    if one.seconds_to_first:
        facts.append(("first token", f"{one.seconds_to_first:.2f} s"))
    if one.disk_bytes:
        facts.append(("on disk", format_bytes(one.disk_bytes)))
    return facts


# --- generation


def status(events: Sequence[Any], before: str) -> str:
    """The line under an answer: the latest chunk's figures, a step until there is one; `before` if nothing is new."""
    chunks = [event for event in events if isinstance(event, Chunk)]
    steps = [event for event in events if isinstance(event, Step)]
    if chunks:
        return live(chunks[-1])
    return progress(steps[-1]) if steps and "lm-live" not in before else before


def live(chunk: Chunk | None) -> str:
    """Speed and context of the answer that is being written."""
    if chunk is None:
        return '<div class="lm-live"></div>'  # keeps the line's place
    used, limit = chunk.context_tokens, max(chunk.context_limit, 1)
    numbers = [(f"{chunk.decode_tps:.1f}", "tok/s")] if chunk.decode_tps else []
    if chunk.prefill_tps:
        numbers.append((f"{chunk.prefill_tps:.0f}", "prefill"))
    if chunk.seconds_to_first:
        numbers.append((f"{chunk.seconds_to_first:.2f}", "s to first"))
    figures = "".join(f"<span><b>{value}</b> {escape(unit)}</span>" for value, unit in numbers)
    if limit >= UNBOUNDED:
        return (
            f'<div class="lm-live lm-num">{figures}<div class="lm-context"><b>{used:,}</b> tokens, no limit</div></div>'
        )
    bar = parts.track(f"Context: {used:,} of {limit:,} tokens", ("", parts.percent(min(used, limit), limit)))
    context = f'<div class="lm-context">{bar}<span><b>{used:,}</b> of {limit:,} context</span></div>'
    return f'<div class="lm-live lm-num">{figures}{context}</div>'


def table(rows: Sequence[Completion]) -> str:
    """Answers of a batch, in the order of their prompts."""
    if not rows:
        return ""
    first = sorted(rows, key=lambda row: (row.index, row.sequence))[:ROWS_SHOWN]
    body = "".join(
        f'<tr><td class="lm-num">{row.index + 1}</td><td translate="no">{escape(row.prompt)}</td><td translate="no">{escape(row.text)}</td>'
        f'<td class="lm-num">{row.new_tokens:,}</td></tr>'
        for row in first
    )
    hidden = len(rows) - ROWS_SHOWN
    more = f'<p class="lm-muted lm-small">{escape(say("rows_more", count=hidden))}</p>' if hidden > 0 else ""
    head = "".join(f"<th>{word}</th>" for word in ("#", "Prompt", "Answer", "Tokens"))
    return (
        f'<div class="lm-table" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{more}"
    )
