"""Benchmark an exported graph against PyTorch, alternating in one process: prefill at several prompt lengths, and decoding.

An encoder generates nothing, so only its prefill is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from lowmem.datasets.texts import evaluation_text
from lowmem.events import Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.models.fetch import fetch
from lowmem.planning.goal import Goal
from lowmem.runtime.onnx.manifest import GRAPH, read_manifest
from lowmem.runtime.onnx.model import open_session
from lowmem.runtime.session import Session

PROMPT_TOKENS, NEW_TOKENS, RUNS = (32, 128, 512), 24, 3
"""Results are medians of the runs."""


def job(model: str, folder: str) -> Generator[Step, None, dict[str, Any]]:
    """Benchmark the graph in `folder` against `model` in PyTorch; see `run.benchmark` for the result.

    Raises:
        LowMemError: one of the two cannot be loaded.
    """
    if read_manifest(Path(folder)).kind == "encoder":
        return (yield from _encoders(model, Path(folder)))
    sessions = {}
    for name, ref, goal in (("torch", model, Goal(precision="fp32", backend="torch")), ("onnx", folder, Goal())):
        yield Step(0, 0, msg("Loading {name}", name=name))
        session = sessions[name] = Session()
        yield from _steps(session.load(session.plan_for(ref, goal), force=True))
    context = min(session.plan.spec.context for session in sessions.values() if session.plan)
    lengths = [length for length in PROMPT_TOKENS if length + NEW_TOKENS < context] or [max(1, context // 2)]
    found: dict[str, Any] = {name: {"prefill_tps": [], "token_ms": []} for name in sessions}
    total = len(lengths) * RUNS
    for position, length in enumerate(lengths):
        prompt = _prompt(sessions["torch"], length)
        measured: dict[str, list[Receipt]] = {name: [] for name in sessions}
        for run in range(RUNS):
            yield Step(
                position * RUNS + run,
                total,
                msg("{length} prompt tokens, run {run}", length=length, run=run + 1),
                "runs",
            )
            for name, session in sessions.items():
                measured[name].append(_receipt(session, prompt))
        for name, receipts in measured.items():
            found[name]["prefill_tps"].append(statistics.median(receipt.prefill_tps for receipt in receipts))
            speed = statistics.median(receipt.decode_tps for receipt in receipts)
            found[name]["token_ms"].append(1000 / speed if speed else None)
    return {"prompts": lengths, **found}


def _encoders(ref: str, folder: Path) -> Generator[Step, None, dict[str, Any]]:
    """The same for an encoder, without figures of new tokens."""
    original = yield from fetch(ref, encoders=True)
    model: Any = AutoModel.from_pretrained(
        original, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    session = open_session(folder / GRAPH)
    config = model.eval().config
    lengths = [length for length in PROMPT_TOKENS if length < config.max_position_embeddings] or [8]
    found: dict[str, Any] = {name: {"prefill_tps": [], "token_ms": [None] * len(lengths)} for name in ("torch", "onnx")}
    for position, length in enumerate(lengths):
        yield Step(position, len(lengths), msg("{length} tokens", length=length), "lengths")
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        feeds = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        with torch.inference_mode():
            engines = {"torch": partial(model, input_ids=ids), "onnx": partial(session.run, None, feeds)}
            rounds = [{name: _seconds(run) for name, run in engines.items()} for _ in range(RUNS + 1)]
        for name in engines:  # the first round warms up
            found[name]["prefill_tps"].append(length / statistics.median(one[name] for one in rounds[1:]))
    return {"prompts": lengths, **found}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _steps(events: Any) -> Generator[Step, None, None]:
    yield from (event for event in events if isinstance(event, Step))


def _prompt(session: Session, length: int) -> str:
    tokenizer = session._resident()[0].tokenizer
    ids = tokenizer(evaluation_text().text[: 16 * length], add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[:length])


def _receipt(session: Session, prompt: str) -> Receipt:
    options = GenerateOptions(max_new_tokens=NEW_TOKENS, greedy=True)
    *_, receipt = session.generate(prompt, options, raw=True, force=True)
    if not isinstance(receipt, Receipt):
        raise RuntimeError("an action ended without a receipt")
    return receipt
