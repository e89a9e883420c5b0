"""Plans, receipts and events as JSON, written once for all endpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lowmem.events import Chunk, Completion, Receipt, Step
from lowmem.planning.plan import Plan
from lowmem.ui.service.prompts import joined

Json = dict[str, Any]


def as_json(value: Any) -> Json:
    """What a service returned as plain data, bytes and seconds as numbers; {} for None."""
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if isinstance(value, Plan):
        return _plan(value)
    verdict = {"verdict": value.verdict} if hasattr(value, "verdict") else {}
    sentence = getattr(value, "sentence", None)  # a claim's is a text
    return asdict(value) | verdict | ({"sentence": sentence()} if verdict and callable(sentence) else {})


def _plan(plan: Plan) -> Json:
    budgets = {
        one.memory: {
            "peak": one.peak,
            "limit": one.limit,
            "verdict": one.verdict,
            "lines": [asdict(line) for line in one.lines],
        }
        for one in plan.estimates
    }
    return {
        "model": plan.spec.ref,
        "precision": plan.precision,
        "device": plan.device,
        "context": plan.context,
        "cache_type": plan.cache_type,
        "kv": plan.cache_type,  # its name in the last release
        "verdict": plan.verdict,
        "sentence": plan.sentence(),
        "reason": plan.reason,
        "budgets": budgets,
        "declined": [asdict(item) for item in plan.declined],
    }


def each_event(frames: Iterator[list[Any]]) -> Iterator[Json]:
    """Every event by itself; a receipt under its name."""
    for events in frames:
        for event in events:
            yield {"receipt": event.as_dict()} if isinstance(event, Receipt) else as_json(event)


def text_so_far(frames: Iterator[list[Any]]) -> Iterator[Json]:
    """All text up to now, last of all with the receipt; before the first text, a note such as the place in the queue."""
    answers: dict[int, str] = {}
    latest: Json = {}
    for events in frames:
        for event in events:
            if isinstance(event, Chunk):
                answers[event.index] = answers.get(event.index, "") + event.text
                latest = {
                    "text": joined(answers),
                    "answers": [answers[key] for key in sorted(answers)],
                    "new_tokens": event.new_tokens,
                    "decode_tps": event.decode_tps,
                    "finish": event.finish,
                }
            elif isinstance(event, Receipt):
                latest = latest | {"receipt": event.as_dict()}
            elif isinstance(event, Step) and not answers:
                latest = {"text": "", "answers": [], "note": event.note}
        if latest:
            yield latest


def batch_so_far(frames: Iterator[list[Any]]) -> Iterator[Json]:
    """All answers up to now, last of all with the receipt. The first step says how many prompts there are."""
    rows: list[Json] = []
    total = 0
    for events in frames:
        rows += [asdict(event) for event in events if isinstance(event, Completion)]
        total = total or next((event.total for event in events if isinstance(event, Step)), 0)
        receipts = [{"receipt": event.as_dict()} for event in events if isinstance(event, Receipt)]
        if not all(isinstance(event, Step) for event in events):
            yield {"done": len(rows), "total": total, "results": rows} | (receipts or [{}])[-1]
