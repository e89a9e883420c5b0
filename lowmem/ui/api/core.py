"""Named endpoints: every action for scripts, with plain typed signatures.

from gradio_client import Client
Client("http://127.0.0.1:7860").predict("The sky is", api_name="/generate")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import wraps
from typing import Any

import gradio as gr

from lowmem.errors import BadInput
from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.machine.budget import MemoryBudget
from lowmem.planning.plan import Plan
from lowmem.ui.api.arguments import documented
from lowmem.ui.parts.bind import ENGINE, bounded, explain, pump
from lowmem.ui.service.engine import AUTO, Choice, Engine
from lowmem.ui.tabs.completion import joined
from lowmem.ui.tabs.prompts import checked

Json = dict[str, Any]


def as_json(plan: Plan) -> Json:
    """A plan as plain data: bytes as numbers, one entry per memory."""
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
        "kv": plan.cache_type,
        "verdict": plan.verdict,
        "sentence": plan.sentence(),
        "reason": plan.reason,
        "budgets": budgets,
        "declined": [asdict(item) for item in plan.declined],
    }


def add_endpoints(engine: Engine) -> None:
    """Add every endpoint to the Blocks that is being built."""
    for quick in (_plan(engine), _models(engine), _machine(engine), _receipt(engine), _stored(engine), _delete(engine)):
        gr.api(told(quick), api_name=quick.__name__, concurrency_limit=None)
    for stream in (_load(engine), _generate(engine), _chat(engine), _batch(engine)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)
    unload = _unload(engine)
    gr.api(told(unload), api_name=unload.__name__, **ENGINE)


def told(action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, its arguments described, its failures as sentences."""

    @wraps(documented(action))
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except Exception as error:
            raise _failure(error) from None

    return run


def told_stream(action: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    """The generator, its arguments described, its failures as sentences."""

    @wraps(documented(action))
    def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from action(*args, **kwargs)
        except Exception as error:
            raise _failure(error) from None

    return run


def _failure(error: Exception) -> gr.Error:
    return gr.Error(" ".join(filter(None, explain(error))), print_exception=False)


def _plan(engine: Engine) -> Callable[..., Json]:
    def plan(
        model: str = AUTO,
        precision: str = AUTO,
        context: int = 2048,
        device: str = AUTO,
        kv: str = "same",
        ram: str = "",
        vram: str = "",
    ) -> dict:
        """The plan for a model and a budget ("4G"; empty is all that is free), without loading anything."""
        return as_json(
            engine.plan(_choice(ram, vram, model=model, precision=precision, context=context, device=device, kv=kv))
        )

    return plan


def _choice(ram: str, vram: str, **values: Any) -> Choice:
    return replace(build(Choice, values), budget=MemoryBudget.parse(ram, vram))


def _models(engine: Engine) -> Callable[..., Json]:
    def models() -> dict:
        """Models that the page lists, by what to ask for; any other of the hub may be named, too, where that is allowed."""
        return {"models": {ref: label for label, ref in engine.catalog()}}

    return models


def _machine(engine: Engine) -> Callable[..., Json]:
    def machine() -> dict:
        """The machine: hardware, what is in use now, the resident model."""
        resident = engine.resident
        return {
            "line": engine.hardware().line(),
            "hardware": asdict(engine.hardware()),
            "now": asdict(engine.snapshot()),
            "resident": as_json(resident) if resident else None,
            "busy": engine.busy,
        }

    return machine


def _receipt(engine: Engine) -> Callable[..., Json]:
    def receipt() -> dict:
        """The last action's receipt, predicted and measured bytes included; empty before the first."""
        last = engine.last_receipt
        return last.as_dict() if last else {}

    return receipt


def _stored(engine: Engine) -> Callable[..., Json]:
    def stored() -> dict:
        """What is kept on the machine's disk: {"stored": [{"key", "name", "kind", "nbytes"}]}, for the page's owner."""
        engine.access.require_owner("Looking at the disk")
        return {"stored": [asdict(one) for one in engine.stored()]}

    return stored


def _delete(engine: Engine) -> Callable[..., Json]:
    def delete(key: str) -> dict:
        """Delete what /stored lists under `key`, for good; {"freed": bytes}."""
        return {"freed": engine.delete(key)}

    return delete


def _unload(engine: Engine) -> Callable[..., Json]:
    def unload() -> dict:
        """Give the resident model's memory back; the receipt, empty when nothing was loaded."""
        done = engine.unload()
        return done.as_dict() if done else {}

    return unload


def _load(engine: Engine) -> Callable[..., Iterator[Json]]:
    def load(
        model: str = AUTO,
        precision: str = AUTO,
        context: int = 2048,
        device: str = AUTO,
        kv: str = "same",
        ram: str = "",
        vram: str = "",
        force: bool = False,
    ) -> Iterator[dict]:
        """Load a model; yields progress, last of all {"receipt": ...}. `force` goes over the budget."""
        token = CancelToken()
        plan = engine.plan(_choice(ram, vram, model=model, precision=precision, context=context, device=device, kv=kv))
        for events in pump(engine.load(plan, token, force=force), token):
            for event in events:
                yield {"receipt": event.as_dict()} if isinstance(event, Receipt) else asdict(event)

    return load


def _generate(engine: Engine) -> Callable[..., Iterator[Json]]:
    def generate(prompt: str, options: dict | None = None, raw: bool = True) -> Iterator[dict]:
        """Continue a text, or answer it with raw=False; yields the text so far, last of all with the receipt."""
        bounded(prompt)
        token = CancelToken()
        chosen = build(GenerateOptions, options or {})
        yield from _streamed(pump(engine.generate(prompt, chosen, token, raw=raw), token))

    return generate


def _chat(engine: Engine) -> Callable[..., Iterator[Json]]:
    def chat(
        message: str, history: list | None = None, system: str = "", options: dict | None = None
    ) -> Iterator[dict]:
        """Answer in a conversation; `history` is a list of {"role", "content"}."""
        opening = [{"role": "system", "content": system}] if system else []
        messages = [*opening, *map(_message, history or []), {"role": "user", "content": message}]
        bounded(message)
        bounded(*(one["content"] for one in messages))
        token = CancelToken()
        yield from _streamed(pump(engine.chat(messages, build(GenerateOptions, options or {}), token), token))

    return chat


def _message(value: Any) -> dict[str, str]:
    if (
        isinstance(value, dict)
        and value.get("role") in ("system", "user", "assistant")
        and isinstance(value.get("content"), str)
    ):
        return {"role": value["role"], "content": value["content"]}
    raise BadInput(
        "A message of the history is not one.", 'Write each as {"role": "user" or "assistant", "content": "..."}.'
    )


def _streamed(frames: Iterator[list[Any]]) -> Iterator[Json]:
    answers: dict[int, str] = {}
    last: Json = {}
    for events in frames:
        for event in events:
            if isinstance(event, Chunk):
                answers[event.index] = answers.get(event.index, "") + event.text
                last = {
                    "text": joined(answers),
                    "answers": [answers[key] for key in sorted(answers)],
                    "new_tokens": event.new_tokens,
                    "decode_tps": event.decode_tps,
                    "finish": event.finish,
                }
            elif isinstance(event, Receipt):
                last = last | {"receipt": event.as_dict()}
        if last:
            yield last


def _batch(engine: Engine) -> Callable[..., Iterator[Json]]:
    def batch(prompts: list, options: dict | None = None, batch_size: int = 0, raw: bool = False) -> Iterator[dict]:
        """Answer many prompts; yields {"done", "total", "results"}, last of all with the receipt."""
        asked = checked([str(prompt) for prompt in prompts])
        bounded(*asked)
        token, rows = CancelToken(), []
        events = engine.batch(asked, build(GenerateOptions, options or {}), token, raw=raw, batch_size=batch_size)
        for gathered in pump(events, token):
            rows += [asdict(event) for event in gathered if isinstance(event, Completion)]
            receipts = [event.as_dict() for event in gathered if isinstance(event, Receipt)]
            if not all(isinstance(event, Step) for event in gathered):
                yield {"done": len(rows), "total": len(asked), "results": rows} | (
                    {"receipt": receipts[-1]} if receipts else {}
                )

    return batch
