"""Plans, meters and receipts as HTML. Pure functions of data; everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowmem.events import Chunk, Completion, Receipt, Step
from lowmem.generate.window_limits import UNBOUNDED
from lowmem.machine.monitor import Snapshot
from lowmem.messages import LANGUAGE, Message, join, msg, tag
from lowmem.planning.fallback import remedies
from lowmem.planning.plan import Line, MemoryEstimate, Plan
from lowmem.precisions import PRECISIONS
from lowmem.ui.html import parts
from lowmem.ui.language import escape, number
from lowmem.ui.names import name
from lowmem.units import format_bytes, format_seconds

ROWS_SHOWN = 200

LOGO = (
    '<svg viewBox="0 0 32 20" width="40" height="25" aria-hidden="true">'
    '<rect class="a" width="15" height="20" rx="3"/><rect class="b" x="17" width="6" height="20" rx="2"/>'
    '<rect class="c" x="25" y="0.5" width="6.5" height="19" rx="2"/></svg>'
)


def header() -> str:
    return f'<header class="lm-header" lang="{tag(LANGUAGE.get())}">{LOGO}<h1>{escape("lowmem")}</h1><p>{escape(msg("Language models inside a memory budget"))}</p></header>'


# --- budgets


def budget(plan: Plan, caption: str = "") -> str:
    """Every budget of a plan as a stacked bar, the computing device's first and with its legend open; the verdict."""
    others = [one for one in plan.estimates if one is not plan.main]
    bars = "".join(_budget_bar(one, opened=one is plan.main) for one in (plan.main, *others))
    return (
        f'<section class="lm-budget" data-verdict="{plan.verdict}">'
        f'<div class="lm-head"><h2>{escape(msg("Memory budget"))}</h2>{parts.pill(plan.verdict)}</div>'
        f'{parts.small(caption)}{bars}<p class="lm-sentence" role="status">{escape(plan.sentence())}</p></section>'
    )


def _budget_bar(one: MemoryEstimate, *, opened: bool) -> str:
    memory, lines = name("memory", one.memory), _merged(one)
    scale = max(one.peak, one.limit, 1)
    segments = "".join(
        f'<span class="lm-seg" data-share="{escape(line.key)}" style="width:{parts.percent(line.count, scale)}"></span>'
        for line in lines
    )
    spoken = join(
        ", ",
        (Message("{share} {count}", share=name("shares", line.key), count=format_bytes(line.count)) for line in lines),
    )
    label = msg(
        "{peak} of {limit} {memory}: {spoken}",
        peak=format_bytes(one.peak),
        limit=format_bytes(one.limit),
        memory=memory,
        spoken=spoken,
    )
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
            merged[line.key] = Line(
                line.key, before.count + line.count, join(" ", filter(None, (before.why, line.why)))
            )
    return list(merged.values())


def _of(label: str, part: int, whole: int) -> str:
    numbers = f'{escape(format_bytes(part))} <span class="lm-muted">{escape(msg("of {whole}", whole=format_bytes(whole)))}</span>'
    return parts.bar_title(label, f'<span class="lm-num">{numbers}</span>')


def _legend_row(key: str, count: int, why: str) -> str:
    tip = f' tabindex="0" data-tip="{escape(why)}" title="{escape(why)}"' if why else ""
    return (
        f'<li{tip}><i class="lm-dot" data-share="{escape(key)}"></i><span>{escape(name("shares", key))}</span>'
        f'<b class="lm-num">{escape(format_bytes(count))}</b></li>'
    )


# --- the set-up


def setup_card(plan: Plan, *, recommended: bool, download: int, disk_free: int) -> str:
    """The setup that would be loaded, with its reason and the files to download."""
    eyebrow = msg("Recommended for this machine") if recommended else msg("Your choice")
    on_onnx = plan.backend == "onnx"
    facts = [
        (msg("Precision"), plan.precision if on_onnx else PRECISIONS[plan.precision].label),
        (msg("Context"), msg("{context:,} tokens", context=plan.context)),
        (msg("Runs on"), msg("{place}, ONNX Runtime", place=plan.place.name) if on_onnx else plan.place.name),
        (
            name("memory", plan.main.memory),
            msg("{peak} of {limit}", peak=format_bytes(plan.main.peak), limit=format_bytes(plan.main.limit)),
        ),
    ]
    fetch = msg("Already on this machine")
    if download:
        free = msg("{size} free on disk", size=format_bytes(disk_free))
        fetch = join(", ", (msg("Download {size}", size=format_bytes(download)), free))
    notes = " · ".join(filter(None, (fetch, plan.spec.licence, plan.spec.source.caution)))
    over = why(plan) if plan.verdict == "over" else ""
    detail = f' <small class="lm-muted">{escape(plan.spec.source.detail)}</small>' if plan.spec.source.detail else ""
    return (
        f'<section class="lm-card" data-verdict="{plan.verdict}"><p class="lm-eyebrow">{escape(eyebrow)}</p>'
        f'<h2 class="lm-model">{escape(plan.spec.name)}{detail}</h2><p class="lm-reason">{escape(plan.reason)}</p>'
        f"{parts.facts(facts)}{over}{parts.small(notes)}</section>"
    )


def why(plan: Plan) -> str:
    """Why a plan is over its budget, and which single change would bring it within."""
    fixes = [
        Message("{reason} {peak}.", reason=lower.reason, peak=format_bytes(lower.main.peak)) for lower in remedies(plan)
    ]
    listed = "".join(f"<li>{escape(fix)}</li>" for fix in fixes)
    instead = (
        f'<div class="lm-fixes"><p>{escape(msg("Any one of these changes makes it fit:"))}</p><ul>{listed}</ul></div>'
        if fixes
        else ""
    )
    return f'<p class="lm-why">{escape(plan.sentence())}</p>{instead}'


def lost(sentence: str, remedy: str) -> str:
    """A model whose process died, and what needs less memory."""
    return (
        f'<div class="lm-notice" data-kind="error" role="alert"><strong>{escape(sentence)}</strong> '
        f"{escape(remedy)}</div>"
    )


def unknown_card(ref: str) -> str:
    """The place of a set-up that could not be planned."""
    return (
        f'<section class="lm-card"><p class="lm-eyebrow">{escape(msg("Your choice"))}</p>'
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
    device = device_label(plan.device) + (msg(", ONNX Runtime") if plan.backend == "onnx" else "")
    items = [
        plan.precision,
        device,
        msg("planned for {context:,} tokens", context=plan.context),
        Message("{size} {memory}", size=size, memory=name("memory", memory)),
    ]
    rest = "".join(f"<span>{escape(part)}</span>" for part in items)
    return f'<div class="lm-slim"><i class="lm-lamp"></i><strong>{escape(plan.spec.name)}</strong>{rest}</div>'


def device_label(key: str) -> str:
    return {"cpu": "CPU", "mps": msg("Apple GPU")}.get(key, "GPU" if key.startswith("cuda") else key)


def progress(step: Step) -> str:
    """A step as a thin bar; without a total it only moves. Counts are shown if they have a unit."""
    counted = ""
    if step.total > 0 and step.unit:
        done, total = (format_bytes(n) if step.unit == "B" else Message("{n:,}", n=n) for n in (step.done, step.total))
        counted = (
            msg("{done} of {total}", done=done, total=total)
            if step.unit == "B"
            else msg("{done} of {total} {unit}", done=done, total=total, unit=name("units", step.unit))
        )
    elif step.total > 0:
        counted = Message("{done:.0%}", done=step.done / step.total)
    width = parts.percent(min(step.done, step.total), step.total) if step.total > 0 else "100%"
    known = "true" if step.total > 0 else "false"
    title = parts.bar_title(step.note, f'<span class="lm-num lm-muted">{escape(counted)}</span>')
    return f'<div class="lm-progress" data-known="{known}" role="status">{title}{parts.track("", ("", width))}</div>'


# --- the machine


def machine(line: str) -> str:
    return f'<p class="lm-machine">{escape(line)}</p>'


def meters(now: Snapshot) -> str:
    """Current RAM, GPU memory and disk."""
    rows = [_meter(name("memory", "ram"), now.ram_used, now.ram_total, now.process_bytes)]
    rows += [_meter(label, used, total) for label, used, total in now.vram]
    free = msg("{size} free on disk", size=format_bytes(now.disk_free))
    rows.append(parts.small(free))
    return f'<section class="lm-meters"><h2>{escape(msg("Memory in use"))}</h2>{"".join(rows)}</section>'


def _meter(label: str, used: int, total: int, own: int = 0) -> str:
    mine = msg("{own} by lowmem", own=format_bytes(own)) if own else ""
    use = msg("{label}: {used} of {total} in use", label=label, used=format_bytes(used), total=format_bytes(total))
    spoken = join(", ", filter(None, (use, mine)))
    bar = parts.track(spoken, ("lm-own", parts.percent(own, total)), ("", parts.percent(max(0, used - own), total)))
    return f'<div class="lm-meter">{_of(label, used, total)}{bar}{parts.small(mine)}</div>'


def resident(plan: Plan | None, busy: str) -> str:
    """The resident model and the current activity."""
    if plan is None:
        body = parts.small(msg("No model is loaded."))
    else:
        facts = msg(
            "{precision} · {device} · planned for {context:,} tokens",
            precision=plan.precision,
            device=device_label(plan.device),
            context=plan.context,
        )
        body = (
            f'<p><strong>{escape(plan.spec.name)}</strong></p><p class="lm-muted lm-small lm-num">{escape(facts)}</p>'
        )
    now = f'<p class="lm-busy lm-small">{escape(busy)}</p>' if busy else ""
    return f'<section class="lm-resident"><h2>{escape(msg("Resident model"))}</h2>{body}{now}</section>'


# --- receipts


def receipt(one: Receipt | None) -> str:
    """Predicted and measured memory, then the other numbers and the notes."""
    title = f"<h2>{escape(msg('Last run'))}</h2>"
    if one is None:
        empty = parts.small(msg("Predicted and measured memory appear here after the first run."))
        return f'<section class="lm-receipt">{title}{empty}</section>'
    bars = parts.peaks(one, lambda memory: msg("{memory} peak", memory=name("memory", memory)))
    what = parts.small(join(" · ", (name("actions", one.action), one.model, one.precision)))
    return (
        f'<section class="lm-receipt">{title}{what}{bars}{parts.stats(_facts(one))}{parts.notes(one.notes)}</section>'
    )


def _facts(one: Receipt) -> list[tuple[str, str]]:
    facts = [(msg("time"), format_seconds(one.seconds))]
    if one.new_tokens:
        facts.append((msg("new tokens"), Message("{new_tokens:,}", new_tokens=one.new_tokens)))
    if one.decode_tps:
        facts.append((msg("decode"), Message("{decode_tps:.1f} tok/s", decode_tps=one.decode_tps)))
    if one.prefill_tps:
        facts.append((msg("prefill"), Message("{prefill_tps:.0f} tok/s", prefill_tps=one.prefill_tps)))
    if one.seconds_to_first:
        facts.append((msg("first token"), Message("{seconds_to_first:.2f} s", seconds_to_first=one.seconds_to_first)))
    if one.disk_bytes:
        facts.append((msg("on disk"), format_bytes(one.disk_bytes)))
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
    numbers = [(Message("{decode_tps:.1f}", decode_tps=chunk.decode_tps), "tok/s")] if chunk.decode_tps else []
    if chunk.prefill_tps:
        numbers.append((Message("{prefill_tps:.0f}", prefill_tps=chunk.prefill_tps), msg("prefill")))
    if chunk.seconds_to_first:
        numbers.append((Message("{seconds_to_first:.2f}", seconds_to_first=chunk.seconds_to_first), msg("s to first")))
    figures = "".join(f"<span><b>{escape(value)}</b> {escape(unit)}</span>" for value, unit in numbers)
    if limit >= UNBOUNDED:
        return f'<div class="lm-live lm-num">{figures}<div class="lm-context"><b>{number(used, ",")}</b> {escape(msg("tokens, no limit"))}</div></div>'
    bar = parts.track(
        msg("Context: {used:,} of {limit:,} tokens", used=used, limit=limit),
        ("", parts.percent(min(used, limit), limit)),
    )
    context = f'<div class="lm-context">{bar}<span><b>{number(used, ",")}</b> {escape(msg("of {limit:,} tokens", limit=limit))}</span></div>'
    return f'<div class="lm-live lm-num">{figures}{context}</div>'


def table(rows: Sequence[Completion]) -> str:
    """Answers of a batch, in the order of their prompts."""
    if not rows:
        return ""
    first = sorted(rows, key=lambda row: (row.index, row.sequence))[:ROWS_SHOWN]
    body = "".join(
        f'<tr><td class="lm-num">{row.index + 1}</td><td translate="no">{escape(row.prompt)}</td><td translate="no">{escape(row.text)}</td>'
        f'<td class="lm-num">{number(row.new_tokens, ",")}</td></tr>'
        for row in first
    )
    hidden = len(rows) - ROWS_SHOWN
    more = parts.small(msg("{count} more in the files below.", count=hidden)) if hidden > 0 else ""
    head = "".join(f"<th>{escape(word)}</th>" for word in ("#", msg("Prompt"), msg("Answer"), msg("Tokens")))
    return (
        f'<div class="lm-table" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{more}"
    )
