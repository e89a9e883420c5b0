"""Named endpoints of long texts, like those in `api`. Streams and batches with a window are options of /generate and /batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import gradio as gr

from lowmem.datasets.long_text import long_text
from lowmem.datasets.texts import MANUAL, evaluation_text
from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.longctx.options import StrategyOptions
from lowmem.longctx.strategies import compare_strategies
from lowmem.machine.budget import MemoryBudget
from lowmem.ui.api.core import told_stream
from lowmem.ui.parts.bind import ENGINE, pump
from lowmem.ui.parts.runner import new_folder
from lowmem.ui.service.engine import AUTO, Engine

Json = dict[str, Any]


def add_longctx_endpoints(engine: Engine) -> None:
    """Add /perplexity, /hidden_states, /recall and /exercise to the Blocks that is being built."""
    for stream in (_perplexity(engine), _hidden_states(engine), _recall(engine), _exercise(engine)):
        gr.api(told_stream(stream), api_name=stream.__name__, **ENGINE)


def _perplexity(engine: Engine) -> Callable[..., Iterator[Json]]:
    def perplexity(
        text: str = "", window: int = 1024, stride: int = 0, sinks: int = 4, kv: str = "same", address: str = ""
    ) -> Iterator[dict]:
        """Perplexity along a text: by windows with a stride, or read once through the cache where stride is 0."""
        engine.require_model()
        token = CancelToken()
        given = long_text(text, source=address, cancel=token).text
        options = build(GenerateOptions, {"window": window, "sinks": sinks, "cache_type": kv})
        if stride:
            events = actions.sliding_perplexity(engine.session, given, window, stride, cancel=token)
        else:
            events = actions.streaming_perplexity(engine.session, given, options, cancel=token)
        yield from _as_json(engine, events, token)

    return perplexity


def _hidden_states(engine: Engine) -> Callable[..., Iterator[Json]]:
    def hidden_states(
        text: str = "",
        window: int = 1024,
        stride: int = 512,
        layers: list | None = None,
        format: str = "npy",
        address: str = "",
    ) -> Iterator[dict]:
        """Hidden states window by window into a file, which the receipt's details name ("file")."""
        engine.require_model()
        token = CancelToken()
        given = long_text(text, source=address, cancel=token).text
        kind = "safetensors" if format == "safetensors" else "npy"
        path = new_folder("hidden") / f"hidden_states.{kind}"
        chosen = [int(layer) for layer in layers or (-1,)]
        events = actions.hidden_states(engine.session, given, window, stride, path, layers=chosen, cancel=token)
        yield from _as_json(engine, events, token)

    return hidden_states


def _recall(engine: Engine) -> Callable[..., Iterator[Json]]:
    def recall(window: int = 1024, sinks: int = 4, kv: str = "same") -> Iterator[dict]:
        """Is a fact remembered half a window later, and two windows later? With window 0: 2,048 tokens later."""
        engine.require_model()
        token, options = CancelToken(), build(GenerateOptions, {"window": window, "sinks": sinks, "cache_type": kv})
        yield from _as_json(
            engine, actions.recall(engine.session, evaluation_text().text, options, cancel=token), token
        )

    return recall


def _exercise(engine: Engine) -> Callable[..., Iterator[Json]]:
    def exercise_(
        model: str = "demo",
        options: dict | None = None,
        ram: str = "",
        precision: str = AUTO,
        text: str = "",
        address: str = "",
    ) -> Iterator[dict]:
        """Five ways to read a text, each in a process of its own; yields steps and points, last of all the receipt."""
        engine.spec(model)  # refuses paths that strangers may not name
        token, chosen = CancelToken(), build(StrategyOptions, options or {})
        engine.access.check_reading(chosen.tokens)
        read = long_text(text, source=address, cancel=token) if text.strip() or address else MANUAL
        budget = engine.child_budget(MemoryBudget.parse(ram))
        events = compare_strategies(model, read, chosen, precision=precision, budget=budget, cancel=token)
        yield from _as_json(engine, events, token)

    exercise_.__name__ = "exercise"
    return exercise_


def _as_json(engine: Engine, events: Iterator[Any], token: CancelToken) -> Iterator[Json]:
    for gathered in pump(events, token):
        for event in gathered:
            if isinstance(event, Receipt):
                engine.note(event)
            yield {"receipt": event.as_dict()} if isinstance(event, Receipt) else asdict(event)
