"""Lessons as HTML: words, the figures of a model, and the typical tables of the course."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from lowmem.events import Receipt
from lowmem.machine.bandwidth import ram_bandwidth
from lowmem.machine.rates import Unmeasured
from lowmem.messages import Message, msg
from lowmem.planning import exported
from lowmem.planning.graph_options import ExportOptions
from lowmem.planning.model_bytes import compute_dtype, weight_bytes
from lowmem.planning.placement import stored_block_bytes
from lowmem.planning.plan import Plan
from lowmem.quant import get
from lowmem.quant.estimate import estimate_quantization
from lowmem.quant.request import QuantizeRequest
from lowmem.ui.html import parts
from lowmem.ui.html.lessons import LESSONS, MODULE, Lesson, Typical
from lowmem.ui.language import escape
from lowmem.units import format_bytes, format_time_range

Facts = list[tuple[str, str]]
Bars = list[tuple[str, int]]

PRECISIONS = ("fp32", "fp16")
WIDTHS = (8, 4, 3)
GRAPHS = ("fp32", "fp16", "int8", "int4")
GROUP, GRAPH_GROUP = 64, 32
WINDOW, SINKS = 1024, 4
LENGTHS = (1024, 4096, 16384)


def lesson(key: str, plan: Plan | None, last: Receipt | None) -> str:
    """The lesson of a tab, with the figures of `plan`'s model where there is one."""
    words = LESSONS[key]
    own = _own(key, plan, last) if plan else ""
    return f'<section class="lm-learn">{_words(words)}{own}{"".join(map(_typical, words.typical))}</section>'


def _words(lesson: Lesson) -> str:
    words = (
        (msg("What it does"), lesson.does),
        (msg("What it costs"), lesson.costs),
        (msg("When not to use it"), lesson.avoid),
    )
    return parts.explanations(words)


def _own(key: str, plan: Plan, last: Receipt | None) -> str:
    facts, bars = _OWN[key](plan, last)
    drawn = _bars(bars, LESSONS[key].title) if bars else ""
    return (
        f'<h3>{escape(msg("Figures for"))} <span translate="no">{escape(plan.spec.name)}</span></h3>'
        f'<div class="lm-learn-own">{parts.stats(facts)}{drawn}</div>'
    )


def _typical(table: Typical) -> str:
    source = msg(
        'Typical figures from the course, module "{module}", section "{section}"; not from this model.',
        module=MODULE,
        section=table.section,
    )
    return parts.small(source) + parts.table(table.header, table.rows)


def _bars(bars: Bars, title: str) -> str:
    """Sizes as bars below each other, all to one scale."""
    largest = max(count for _, count in bars) or 1
    rows = "".join(parts.bar(label, parts.percent(count, largest), format_bytes(count)) for label, count in bars)
    return f'<figure class="lm-sizes"><figcaption>{escape(title)}</figcaption>{rows}</figure>'


def _dtype(plan: Plan) -> str:
    return compute_dtype(plan.precision, plan.place.dtypes)


def _precisions(plan: Plan, keys: Sequence[str]) -> list[str]:
    """Those of `keys` that the model can be had in; none where its files hold codes."""
    return [] if plan.spec.exported or plan.spec.stored else list(keys)


def _generate(plan: Plan, last: Receipt | None) -> tuple[Facts, Bars]:
    spec, weights, kv = plan.spec, plan.main.share("weights"), plan.main.share("kv")
    facts = [
        (msg("Weights in {precision}", precision=plan.precision), format_bytes(weights)),
        (
            msg("KV cache per token"),
            format_bytes(kv / (plan.cached_tokens * plan.batch) if kv else spec.kv_bytes_per_token(_dtype(plan))),
        ),
        (msg("Blocks x KV heads x head size"), f"{spec.layers} x {spec.kv_heads} x {spec.head_dim}"),
    ]
    if last and last.decode_tps and last.model == spec.name:
        facts.append(
            (msg("Time per token, measured"), Message("{decode_tps:.1f} ms", decode_tps=1000 / last.decode_tps))
        )
    lengths = [count for count in LENGTHS if count < spec.context] + [spec.context]
    caches = [
        (msg("KV cache, {count:,} tokens", count=count), spec.kv_bytes(count, 1, _dtype(plan))) for count in lengths
    ]
    return facts, [(msg("Weights"), weights), *caches]


def _quantize(plan: Plan, _last: Receipt | None) -> tuple[Facts, Bars]:
    """Sizes of checkpoints."""
    spec = plan.spec
    facts = [
        (msg("Parameters"), msg("{parameters:,.0f} million", parameters=spec.parameters / 1000000.0)),
        (msg("Blocks"), f"{spec.layers}"),
    ]
    if not _precisions(plan, PRECISIONS):
        return facts, []
    bars = [(key, weight_bytes(spec, key, key)) for key in PRECISIONS]
    rtn = get("rtn")
    for bits in WIDTHS:
        cost = estimate_quantization(spec, QuantizeRequest(spec.ref, rtn, rtn.Options(bits=bits, group_size=GROUP)))
        bars.append((msg("{bits} bits, groups of {group}", bits=bits, group=GROUP), cost.output_bytes))
        facts.append(
            (
                msg("Bits per quantized weight, {bits} bits", bits=bits),
                Message("{bits:.2f}", bits=cost.bits_per_quantized_weight),
            )
        )
    return facts, bars


def _offload(plan: Plan, last: Receipt | None) -> tuple[Facts, Bars]:
    blocks = stored_block_bytes(plan.spec)
    facts = [(msg("Blocks"), f"{len(blocks)}"), (msg("Size of a block"), format_bytes(max(blocks, default=0)))]
    facts.append((msg("Read per token, all blocks offloaded"), format_bytes(sum(blocks))))
    try:
        rate = ram_bandwidth(None)
        facts.append(
            (
                msg("Time to read them from RAM, measured"),
                Message("{blocks:.2f} s", blocks=sum(blocks) / rate) if rate else "-",
            )
        )
    except Unmeasured:
        pass
    if last and last.details.get("seconds_per_token") and last.model == plan.spec.name:
        facts.append(
            (
                msg("Time per token, measured"),
                Message("{seconds_per_token:.2f} s", seconds_per_token=last.details["seconds_per_token"]),
            )
        )
    bars = [(msg("All blocks"), sum(blocks)), (msg("Two blocks (buffers)"), 2 * max(blocks, default=0))]
    return facts, bars


def _longctx(plan: Plan, _last: Receipt | None) -> tuple[Facts, Bars]:
    spec, dtype = plan.spec, _dtype(plan)
    facts = [
        (msg("KV cache per token"), format_bytes(spec.kv_bytes_per_token(dtype))),
        (msg("The model's context"), msg("{context:,} tokens", context=spec.context)),
    ]
    whole = [(msg("All {count:,} tokens", count=count), spec.kv_bytes(count, 1, dtype)) for count in LENGTHS[1:]]
    window, sinks = (plan.window, plan.sinks) if plan.window else (WINDOW, SINKS)
    return facts, [
        *whole,
        (
            msg("A window of {window:,} and {sinks} sinks", window=window, sinks=sinks),
            spec.kv_bytes(window + sinks, 1, dtype),
        ),
    ]


def _export(plan: Plan, _last: Receipt | None) -> tuple[Facts, Bars]:
    spec = plan.spec
    if not _precisions(plan, GRAPHS) or exported.refusal(spec):
        return [(msg("Blocks"), f"{spec.layers}")], []
    bars = [(key, exported.disk_bytes(spec, key, GRAPH_GROUP)) for key in GRAPHS]
    facts = [(msg("KV cache per token"), format_bytes(exported.kv_bytes(spec, 1, 1)))]
    with suppress(Unmeasured):
        seconds = exported.writing_seconds(spec, ExportOptions())
        facts.insert(0, (msg("Time to write it in int8"), format_time_range(seconds)))
    return facts, bars


_OWN: dict[str, Callable[[Plan, Receipt | None], tuple[Facts, Bars]]] = {
    "generate": _generate,
    "quantize": _quantize,
    "offload": _offload,
    "longctx": _longctx,
    "export": _export,
}
