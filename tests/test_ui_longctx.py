"""The Long Context tab without a browser: endpoints on a toy, its modes' views, its refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from toys import save_toy
from ui_stub import StubEngine, close

from lowmem.errors import BadInput, NotAllowed
from lowmem.events import CancelToken, Receipt
from lowmem.longctx.options import parse_layers
from lowmem.longctx.strategies import Point
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime.session import Session
from lowmem.settings import settings
from lowmem.ui.html import longctx as render_longctx
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.services import Services
from lowmem.ui.tabs.longctx import LongContextTab

TEXT = "The river runs to the sea. " * 40
OPTIONS = (64, 4, 0.7, 1.0, "same")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = save_toy("llama", tmp_path_factory.mktemp("toy"))
    session = Session()
    hardware = session.hardware()
    for _ in session.load(
        plan(read_spec(str(folder)), hardware, MemoryBudget.detect(hardware), Goal(precision="fp32"))
    ):
        pass
    return Engine(lambda: session)


@pytest.fixture(scope="module")
def loaded(engine: Engine) -> Engine:
    assert engine.session.plan is not None
    return engine


@pytest.fixture(scope="module")
def tab(loaded: Engine) -> LongContextTab:
    with gr.Blocks():
        return LongContextTab(Context(Services(loaded), StopTokens(), Sidebar(loaded)))


def mode(tab: LongContextTab, kind: str) -> Any:
    return next(made for made in tab.modes if made.key == kind)


def finished(started: tuple[Iterator[Any], Any]) -> list[Any]:
    events, view = started
    for event in events:
        view([event])
    return view([])


def test_text_goes_on_beyond_the_context_until_stop(tab: LongContextTab) -> None:
    token = CancelToken()
    events, view = mode(tab, "continue")._start(token, TEXT, None, "", *OPTIONS)
    for event in events:
        shown = view([event])
        if getattr(event, "new_tokens", 0) > 600:
            token.set()
    live, text, link = view([])
    assert "no limit" in live
    assert text
    assert "continuation.txt" in link
    assert shown[1]


def test_a_stop_before_the_first_token_leaves_no_file(tab: LongContextTab) -> None:
    folders = settings().outputs
    before = set(folders.glob("stream-*"))
    _, view = mode(tab, "continue")._start(CancelToken(), TEXT, None, "", *OPTIONS)
    _, _, link = view([])
    assert link == ""
    assert set(folders.glob("stream-*")) == before


def test_perplexity_both_ways_is_a_figure_and_a_plot(tab: LongContextTab) -> None:
    for way in ("cache", "windows"):
        result, plot = finished(mode(tab, "perplexity")._start(CancelToken(), TEXT, None, "", way, 32, *OPTIONS))
        assert "perplexity" in result
        assert "<svg" in plot


def test_hidden_states_are_a_link(tab: LongContextTab) -> None:
    (result,) = finished(mode(tab, "hidden")._start(CancelToken(), TEXT, None, "", "0,-1", "safetensors", 32, 64))
    assert "hidden_states.safetensors" in result
    assert "2 x 1,080 x 64" in result


def test_recall_is_reported(tab: LongContextTab) -> None:
    (result,) = finished(mode(tab, "recall")._start(CancelToken(), *OPTIONS))
    assert result.count("<tr>") == 3


def test_chat_puts_the_text_first_and_keeps_the_question(tab: LongContextTab) -> None:
    history, message, _ = finished(
        mode(tab, "chat")._start(CancelToken(), "A river.", None, "", [], "Where?", *OPTIONS)
    )
    assert message == ""
    assert [entry["role"] for entry in history] == ["user", "assistant"]
    with pytest.raises(BadInput, match="nothing to send"):
        mode(tab, "chat")._start(CancelToken(), "A river.", None, "", [], " ", *OPTIONS)


def test_the_estimate_follows_window_and_bits(tab: LongContextTab) -> None:
    cards = {
        tab._card(TEXT, None, *values)
        for values in (OPTIONS, (128, 4, 0.7, 1.0, "same"), (128, 4, 0.7, 1.0, "int4"), (0, 4, 0.7, 1.0, "same"))
    }
    assert len(cards) == 4
    assert "64 sinks leave no room" in tab._card(TEXT, None, 64, 64, 0.7, 1.0, "same")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("hidden", ("", None, "", "-1", "npy", 32, 64), "The text is empty."),
        ("hidden", (TEXT, None, "", "-1", "npy", 65, 64), "A stride of 65 does not work with windows of 64"),
        ("hidden", (TEXT, None, "", "-1", "npy", 32, 0), "has 0 tokens"),
        ("perplexity", (TEXT, None, "", "cache", 1, 8, 8, 0.7, 1.0, "same"), "8 sinks leave no room"),
        ("continue", ("", None, "/etc/passwd", *OPTIONS), "is not the URL of a text"),
        ("continue", (TEXT, None, "", 4096, 4, 0.7, 1.0, "same"), "A window of 4,096 tokens with 4 sinks"),
    ],
)
def test_bad_input_gets_one_sentence(kind: str, values: tuple[Any, ...], message: str, tab: LongContextTab) -> None:
    with pytest.raises(BadInput, match=message):
        finished(mode(tab, kind)._start(CancelToken(), *values))
    with pytest.raises(BadInput, match="is not a list of layers"):
        parse_layers("last")


def test_the_exercise_is_a_table_with_what_failed() -> None:
    table = render_longctx.points([Point("full", 10, 5.0, 0.01, 100, 1000), Point("other", error="too <large>")])
    assert "too &lt;large&gt;" in table
    assert "5.00" in table


@pytest.fixture(scope="module")
def client(loaded: Engine) -> Iterator[Client]:
    demo = build_ui(loaded)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    close(demo)


def test_endpoints(client: Client) -> None:
    receipt = client.predict(TEXT, 64, 32, api_name="/perplexity")["receipt"]
    assert receipt["details"]["tokens"] == 1079
    receipt = client.predict(TEXT, 64, 0, 4, "int4", api_name="/perplexity")["receipt"]
    assert receipt["details"]["cache_type"] == "int4"
    receipt = client.predict(TEXT, 64, 32, api_name="/hidden_states")["receipt"]
    assert Path(receipt["details"]["file"]).stat().st_size > 1080 * 64 * 4
    recalls = client.predict(64, 4, "int8", api_name="/recall")["receipt"]["details"]["recalls"]
    assert [one["distance"] for one in recalls] == [32, 128]
    with pytest.raises(AppError, match="A stride of 65"):
        client.predict(TEXT, 64, 65, api_name="/hidden_states")


def test_the_exercise_is_an_endpoint(client: Client, loaded: Engine) -> None:
    assert loaded.resident is not None
    model, options = loaded.resident.spec.ref, {"tokens": 300, "window": 64, "points": 1}
    job = client.submit(model, options, text=TEXT, api_name="/compare_strategies")
    receipt = job.result(timeout=300)["receipt"]
    assert [point["error"] for point in receipt["details"]["points"]] == [""] * 5
    assert len({point["strategy"] for point in receipt["details"]["points"]}) == 5
    assert {"strategy", "tokens", "perplexity", "token_seconds", "kv_bytes", "ram_bytes"} <= job.outputs()[-2].keys()
    assert receipt["details"]["text"] == "pasted"
    with pytest.raises(AppError, match="Tokens of text"):
        client.predict(model, {"tokens": 1}, api_name="/compare_strategies")


def test_a_visitor_gets_a_long_text_and_no_endless_one(tab: LongContextTab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tab.engine, "access", Access(public=True))
    token = CancelToken()
    events, _ = mode(tab, "continue")._start(token, TEXT, None, "", *OPTIONS)
    for event in events:
        if getattr(event, "new_tokens", 0) > 600:
            token.set()
    assert isinstance(event, Receipt)
    assert event.new_tokens > 600
    with pytest.raises(NotAllowed, match="5,000 tokens of text are more than the 4,096"):
        mode(tab, "strategies")._start(CancelToken(), TEXT, None, "", 5000, 64, 4, "4", 2, 8.0)


def test_without_a_model_every_mode_says_so() -> None:
    with gr.Blocks():
        empty = StubEngine()
        tab = LongContextTab(Context(Services(empty), StopTokens(), Sidebar(empty)))
    with pytest.raises(BadInput, match="No model is loaded"):
        mode(tab, "recall")._start(CancelToken(), *OPTIONS)
    assert "Load a model" in tab._card("", None, *OPTIONS)
