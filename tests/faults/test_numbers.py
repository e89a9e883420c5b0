"""Numbers and values of strangers: each has its price before it is taken, and what is wrong is one sentence."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import toys

from lowmem.errors import BadInput, DoesNotFit, NotAllowed
from lowmem.events import CancelToken, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.longctx.options import ReadingLimit
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.isolated import run_isolated
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime.session import Session
from lowmem.settings import settings
from lowmem.ui.api.endpoints import ENDPOINTS, Endpoint
from lowmem.ui.api.publish import _served
from lowmem.ui.parts import failures
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.longctx import TextSource
from lowmem.ui.service.services import Services

LONGEST_SECONDS = 60.0  # what_runs reads the whole catalog once, here on a busy machine
OPTIONS = GenerateOptions(max_new_tokens=4, greedy=True)
PROMPTS = [f"Number {number}" for number in range(8)]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = toys.save_toy("llama", tmp_path_factory.mktemp("toy"))
    loaded = Session()
    hardware = loaded.hardware()
    goal = Goal(context=256, precision="fp32", backend="torch")
    list(loaded.load(plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), goal)))
    return loaded


@pytest.fixture
def tight(session: Session, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Estimates are over the budget above a number of sequences."""
    estimate = Session.estimate

    def limit(most: int) -> None:
        def estimated(
            self: Session, tokens: int, options: GenerateOptions, batch: int = 1, *, raw: bool = False
        ) -> Any:
            found = estimate(self, tokens, options, batch, raw=raw)
            if batch <= most:
                return found
            lines = tuple(type(one)(one.memory, one.lines, 1) for one in found.estimates)
            return type(found)(**{name: getattr(found, name) for name in found.__slots__} | {"estimates": lines})

        monkeypatch.setattr(Session, "estimate", estimated)

    return limit


def test_an_explicit_batch_size_is_lowered_to_what_fits(session: Session, tight: Callable[[int], None]) -> None:
    tight(2)
    events = list(session.batch(PROMPTS, OPTIONS, batch_size=8))
    notes = [str(event.note) for event in events if isinstance(event, Step)]
    assert "8 prompts at a time do not fit the budget: 2 at a time." in notes
    assert sum(isinstance(event, Completion) for event in events) == 8
    receipt = events[-1]
    assert isinstance(receipt, Receipt)
    assert receipt.details["batch"] == 2
    assert "8 prompts at a time do not fit the budget: 2 at a time." in [str(note) for note in receipt.notes]


@pytest.mark.parametrize("size", [None, 1, 8])
def test_a_batch_that_fits_not_even_alone_is_refused(
    session: Session, tight: Callable[[int], None], size: int | None
) -> None:
    tight(0)
    for prompts in (PROMPTS, PROMPTS[:1]):
        with pytest.raises(DoesNotFit, match="budget"):
            list(session.batch(prompts, OPTIONS, batch_size=size))
    assert len(list(session.batch(PROMPTS, OPTIONS, batch_size=size, force=True))) > 8


@pytest.mark.parametrize("size", [0, -1, 65, 10**9])
def test_a_batch_size_out_of_range_is_refused(session: Session, size: int) -> None:
    with pytest.raises(BadInput, match="batch size"):
        list(session.batch(PROMPTS, OPTIONS, batch_size=size))


def refused(events: Iterator[Any], sentence: str) -> None:
    with pytest.raises(NotAllowed, match=sentence):
        list(events)


def test_what_a_visitor_may_read_and_write_is_bounded_in_size(session: Session, tmp_path: Path) -> None:
    text, out = "word " * 100, tmp_path / "states.npy"
    short, small = ReadingLimit(5_000, 10**9), ReadingLimit(5_000, 10**4)
    assert list(actions.hidden_states(session, text, 64, 64, out, limit=short))
    out.unlink()
    refused(actions.hidden_states(session, text, 64, 1, out, limit=short), "would read")
    refused(actions.hidden_states(session, text, 64, 64, out, limit=small), "would take")
    assert list(tmp_path.iterdir()) == []
    assert list(actions.sliding_perplexity(session, text, 64, 32, limit=short))
    refused(actions.sliding_perplexity(session, text, 64, 1, limit=short), "would read")
    options, few = GenerateOptions(window=64), ReadingLimit(400, 0)
    refused(actions.streaming_perplexity(session, text, options, limit=few), "would read")
    refused(actions.recall(session, text, replace(options, window=300), limit=few), "would read")


def test_the_page_bounds_what_visitors_read(services: Services) -> None:
    source, options, cancel = TextSource("a " * 150_000), GenerateOptions(window=64), CancelToken()
    long = services.longctx
    for events in (
        long.perplexity(source, options, 0, cancel),
        long.perplexity(source, options, 8, cancel),
        long.hidden_states(source, 64, 64, [-1], "npy", cancel),
        long.recall(replace(options, window=200_000), cancel),
    ):
        with pytest.raises(NotAllowed, match="would read"):
            list(events)
    services.engine.access = Access()
    assert services.engine.access.reading_limit is None


EXTREME: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, -(2**63), 10**18, 10**400, 0.5, float("nan"), float("inf"), -1e308, "", " ", "demo",
    "a" * 300_000, "../../etc/passwd", "/etc", "\x00", "\ud800", "1e999G", "9" * 5000 + "T", "-4G", "4G", "0-99999999", "all",
    [], [None], [[]], [{}], ["x"] * 20_000, [10**400], [float("inf")], ["fp32", "gptq:4:64", "rtn:0:0"], {}, {"": None},
    {"max_new_tokens": 10**12}, {"window": float("nan")}, {"num_return_sequences": 16, "max_new_tokens": 4096},
    {"bits": [3, [4], {}]}, {"rtn": {"bits": [[]]}}, {"rtn": 5}, {"max_new_tokens": 3, "seed": -1},
    {"tokens": 10**30}, [{"role": "user", "content": ["x"]}], [{"role": "tool"}], "fp32", "int8", "rtn", "onnx", "manual",
]  # fmt: skip
SMALL: list[Any] = ["Hi", ["Hi"], {"max_new_tokens": 3}, 64, "demo", "", False]


def no_process(*_: Any, **__: Any) -> Iterator[Any]:
    raise BadInput("No process is started in this test.")
    yield


@pytest.fixture
def services(session: Session, monkeypatch: pytest.MonkeyPatch) -> Services:
    monkeypatch.setenv("LOWMEM_HOME", str(settings().home))
    for module in list(sys.modules.values()):
        if getattr(module, "run_isolated", None) is run_isolated:
            monkeypatch.setattr(module, "run_isolated", no_process)
    services = Services(Engine(lambda: session, access=Access(public=True, owner="owner")))
    assert services.engine.session is session
    monkeypatch.setattr(services.engine, "load", lambda *_, **__: no_process())
    monkeypatch.setattr(session, "unload", lambda: None)
    monkeypatch.setattr("lowmem.offload.run.fetch", no_process)
    return services


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
def test_every_endpoint_survives_every_value(
    endpoint: Endpoint, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    bugs: list[str] = []
    explain = failures.explain

    def explained(error: Exception) -> tuple[str, str]:
        found = explain(error)
        if found[0].startswith("Something went wrong"):
            bugs.append(f"{type(error).__name__}: {error}"[:300])
        return found

    monkeypatch.setattr("lowmem.ui.api.publish.explain", explained)
    served: Any = _served(endpoint, services)
    names = list(served.__signature__.parameters)
    chance = random.Random(endpoint.name)
    tries: list[dict[str, Any]] = [{name: value} for name in names for value in EXTREME]
    tries += [{name: chance.choice(EXTREME + SMALL) for name in names} for _ in range(60)]
    small = {
        "prompt": "Hi",
        "message": "Hi",
        "prompts": ["Hi"],
        "model": "demo",
        "models": ["demo"],
        "variants": ["fp32"],
        "text": "A text of some words.",
    }
    for values in tries:
        needed = {
            name: small.get(name, "x")
            for name, one in served.__signature__.parameters.items()
            if one.default is one.empty
        }
        options = {"options": {"max_new_tokens": 2}} if endpoint.name in ("generate", "chat", "batch") else {}
        started = time.monotonic()
        with suppress(gr.Error):
            answer = served(**{**needed, **options, **values})
            for _ in answer if isinstance(answer, Iterator) else ():
                pass
        assert not [bug[:200] for bug in bugs], f"{values!r}"[:300]
        assert time.monotonic() - started < LONGEST_SECONDS, f"{values!r}"[:300]
        assert services.engine.lane._seats() == []
        assert services.engine.resident, f"{values!r}"[:300]


def test_the_page_lives(services: Services, tmp_path: Path) -> None:
    assert _served(next(one for one in ENDPOINTS if one.name == "machine"), services)()["resident"]
