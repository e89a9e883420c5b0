"""The Offload tab without a browser: endpoints on a toy, what it shows, what it refuses."""

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

from lowmem.errors import BadInput, LowMemError
from lowmem.events import CancelToken, Receipt
from lowmem.fields import build
from lowmem.machine import bandwidth, rates
from lowmem.ui.html import offload as render_offload
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.offload import OffloadRequest, OffloadService
from lowmem.ui.service.services import Services
from lowmem.ui.tabs.offload import OffloadTab

PROMPT = "An old map"


@pytest.fixture(autouse=True)
def _quickly_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SECONDS", 0.01)
    monkeypatch.setattr(rates, "PROBE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("llama", tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def tab(engine: Engine) -> OffloadTab:
    with gr.Blocks():
        return OffloadTab(Context(Services(engine), StopTokens(), Sidebar(engine)))


def values(tab: OffloadTab, folder: Path, where: str = "auto", disk: str = "", answers: int = 1) -> list[Any]:
    return [str(folder), tab.ram.maximum, tab.vram.maximum, where, disk, "", answers]


def test_the_page_has_one_of_each_element() -> None:
    page = build_ui(StubEngine())
    ids = [block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)]
    assert {"offload-model", "offload-start", "offload-picture", "offload-compare-start", "offload-answers"} <= set(ids)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(("vram", "seen"), [(0, False), (4, True)])
def test_a_gpu_has_a_slider_of_its_own(vram: float, seen: bool) -> None:
    engine = StubEngine(vram)
    with gr.Blocks():
        tab = OffloadTab(Context(Services(engine), StopTokens(), Sidebar(engine)))
    assert tab.vram.visible is seen
    assert tab.ram_list.visible is seen


def test_the_column_is_coloured_by_where_blocks_live(tab: OffloadTab, folder: Path) -> None:
    picture, button, problem = tab.estimate.update(*values(tab, folder))
    assert picture.count('data-place="ram" title="block') == 2
    assert button.interactive
    assert problem == ""
    picture = tab.estimate.update(*values(tab, folder, "choose", "1"))[0]
    assert picture.count('data-place="mapped" title="block') == 1


def test_what_was_never_measured_is_said_and_then_measured(tab: OffloadTab, folder: Path) -> None:
    wish = values(tab, folder, "disk")
    assert "Measure the speed of this machine" in tab.estimate.update(*wish)[0]
    assert "per token, limited by" in tab._measure(*wish)
    assert "per token, limited by" in tab.estimate.update(*wish)[0]
    *_, ready = tab._measure_again(*wish)
    assert ready.interactive


@pytest.mark.parametrize(
    ("where", "disk", "message"),
    [("choose", "7", "There are no blocks 7"), ("choose", "x", "is not a block"), ("choose", "1-0", "no blocks 1-0")],
)
def test_bad_lists_stay_in_place(where: str, disk: str, message: str, tab: OffloadTab, folder: Path) -> None:
    picture, button, problem = tab.estimate.update(*values(tab, folder, where, disk))
    assert picture == ""
    assert not button.interactive
    assert message in problem


def test_a_run_ends_in_predicted_against_measured(tab: OffloadTab, folder: Path) -> None:
    events, view = tab._run(CancelToken(), PROMPT, 4, *values(tab, folder, "disk"))
    for event in events:
        view([event])
    live, text, made = view([])
    assert text
    assert "tok/s" in live
    assert "predicted" in made
    assert tab.service.engine.last_receipt is not None
    assert tab.service.engine.last_receipt.action == "offload"


@pytest.mark.parametrize("answers", [3, 20])
def test_answers_at_once_differ(answers: int, tab: OffloadTab, folder: Path) -> None:
    events, view = tab._run(CancelToken(), PROMPT, 8, *values(tab, folder, answers=answers))
    for event in events:
        view([event])
    text = view([])[1]
    assert text.count("\u2014 ") == answers


def test_as_many_answers_as_pay(tab: OffloadTab, folder: Path) -> None:
    made = tab.service.plan(OffloadRequest(str(folder), num_return_sequences=0))
    assert made.batch > 1
    assert f"serves {made.batch} sequences" in made.reason
    with pytest.raises(BadInput, match="Sequences is 65"):
        build(OffloadRequest, {"model": str(folder), "num_return_sequences": 65})


def test_the_exercise_is_a_table_and_a_plot(tab: OffloadTab, folder: Path) -> None:
    events = tab.service.compare(OffloadRequest(str(folder)), PROMPT, 3, CancelToken(), ("streamed", "accelerate"))
    rows = [event for event in events if isinstance(event, dict)]
    assert [row["method"] for row in rows] == ["streamed", "accelerate"]
    rows.append({"method": "disk", "error": "too <large>"})
    table = render_offload.comparison(rows)
    assert "too &lt;large&gt;" in table
    assert "disk, no page cache" in table
    assert "<svg" in render_offload.plot(rows, "toy")
    with pytest.raises(BadInput, match="There is no method 'x'"):
        list(tab.service.compare(OffloadRequest(str(folder)), PROMPT, 3, CancelToken(), ("x",)))


def test_a_public_page_reads_no_strangers_folder(folder: Path) -> None:
    service = OffloadService(Engine(access=Access(public=True)))
    for attempt in (
        lambda: service.plan(OffloadRequest(str(folder))),
        lambda: list(service.compare(OffloadRequest(str(folder)), "x", 1, CancelToken())),
    ):
        with pytest.raises(LowMemError):
            attempt()


def test_speed_is_told_only_where_the_model_is(tab: OffloadTab) -> None:
    plan = tab.service.plan(OffloadRequest("demo"))
    assert tab.service.speed(plan) is None
    assert tab.service.measure(plan) is None
    assert "once the model is on this machine" in tab._picture(plan, None)


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    demo = build_ui(engine)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    close(demo)


def test_endpoints(client: Client, folder: Path) -> None:
    made = client.predict(model=str(folder), disk_blocks="0-1", api_name="/offload_plan")
    assert set(made["placement"]["blocks"]) == {"disk"}
    assert made["speed"]["seconds_per_token"] > 0
    told = list(client.submit(PROMPT, model=str(folder), new_tokens=4, disk_blocks="1", api_name="/offload"))
    receipt = told[-1]["receipt"]
    assert receipt["details"]["blocks"] == ["ram", "disk"]
    assert "".join(one.get("text", "") for one in told)
    rows = list(client.submit(PROMPT, model=str(folder), new_tokens=2, methods=["ram"], api_name="/offload_compare"))
    assert rows[-1]["method"] == "ram"
    for wrong, message in (
        ({"ram": "120M"}, "Even block by block"),
        ({"disk_blocks": "9"}, "There are no blocks 9"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(PROMPT, model=str(folder), api_name="/offload", **wrong)
    with pytest.raises(AppError, match=r"is empty|nothing"):
        client.predict(" ", model=str(folder), api_name="/offload")


def test_a_file_that_is_taken_away_leaves_the_page_standing(tmp_path: Path, client: Client, engine: Engine) -> None:
    own = save_toy("gpt2", tmp_path / "own")
    service = OffloadService(engine)
    made = list(service.run(OffloadRequest(str(own), disk_blocks="all"), PROMPT, 3, CancelToken()))
    assert isinstance(made[-1], Receipt)
    (own / "model.safetensors").rename(own / "elsewhere")
    with pytest.raises(AppError, match="no weights"):
        client.predict(PROMPT, model=str(own), new_tokens=3, disk_blocks="all", api_name="/offload")
    (own / "elsewhere").rename(own / "model.safetensors")
    told = client.predict(PROMPT, model=str(own), new_tokens=3, disk_blocks="all", api_name="/offload")
    assert told["receipt"]["new_tokens"] == 3
