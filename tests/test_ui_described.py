"""Planning for another machine on the page: the endpoints, the accordion, and that nothing there can be loaded."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_stub import StubEngine, close

from lowmem.messages import LANGUAGE
from lowmem.models.catalog import CATALOG
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.parts.another_machine import AnotherMachine
from lowmem.ui.parts.context import Context
from lowmem.ui.parts.sidebar import Sidebar
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.services import Services


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    demo = build_ui(StubEngine())
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    yield Client(url, verbose=False)
    close(demo)


@pytest.fixture(scope="module")
def panel() -> AnotherMachine:
    engine = StubEngine()
    with gr.Blocks():
        return AnotherMachine(Context(Services(engine), StopTokens(), Sidebar(engine)))


def test_the_endpoint_plans_for_a_card_that_is_not_here(client: Client) -> None:
    found = client.predict("Qwen/Qwen2.5-7B-Instruct", gpu="t4", api_name="/plan_for")
    assert not found["runs_here"]
    assert found["note"] == "A plan for another machine (NVIDIA T4): it cannot be run here."
    assert found["precision"] == "bnb8"
    assert found["tokens_per_second"]["low"] < found["tokens_per_second"]["high"]
    assert found["blocks"] == {"gpu": 28, "ram": 0, "disk": 0}
    assert found["install"].startswith("pip install")
    split = client.predict("Qwen/Qwen2.5-7B-Instruct", vram="6G", ram="16G", api_name="/plan_for")
    assert split["blocks"] == {"gpu": 3, "ram": 25, "disk": 0}


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("/plan_for", {"gpu": "voodoo2"}, "There is no GPU 'voodoo2' in the table."),
        ("/plan_for", {}, "No GPU is described."),
        ("/plan_for", {"gpu": "t4", "precision": "bf16"}, "NVIDIA T4 does not support bf16"),
        ("/what_runs", {"ram": "lots"}, "'lots' is not a size."),
        ("/load", {"model": "demo", "vram": "6G"}, "This machine has no GPU, so 6.00 GB of GPU memory cannot be used."),
        ("/plan", {"model": "demo", "vram": "6G"}, "This machine has no GPU, so 6.00 GB of GPU memory cannot be used."),
    ],
)
def test_bad_input_gets_a_sentence(client: Client, name: str, arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(AppError) as caught:
        client.predict(**arguments, api_name=name)
    assert sentence in str(caught.value)


def test_the_table_has_its_cells_and_its_csv(client: Client) -> None:
    found = client.predict(api_name="/what_runs")
    rows = list(csv.DictReader(io.StringIO(found["csv"])))
    assert len(rows) == len(found["cells"])
    assert {cell["vram_gb"] for cell in found["cells"]} == {4, 6, 8, 12, 16, 24}


def test_the_page_has_one_of_each_element() -> None:
    page = build_ui(StubEngine())
    ids = [block.elem_id for block in page.blocks.values() if getattr(block, "elem_id", None)]
    assert {"another-machine", "another-gpu", "another-vram", "another-plan", "what-runs", "what-runs-csv"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_the_page_plans_and_says_that_it_cannot_run(panel: AnotherMachine) -> None:
    card, install = panel.view("", "Qwen/Qwen2.5-7B-Instruct", 6, 16)
    assert "Generic GPU · 6.00 GB VRAM · 16.0 GB RAM · not this machine" in card
    assert "3 blocks on the GPU, 25 in RAM" in card
    assert "0.49 to 2.3 tok/s" in card
    assert "it cannot be run here" in card
    assert install.value.startswith("pip install")
    card, _ = panel.view("t4", None, 6, 16)
    assert "NVIDIA T4" in card


def test_the_page_offers_no_way_to_load_the_plan(panel: AnotherMachine) -> None:
    buttons = [one for one in panel.box.children if isinstance(one, gr.Button)]
    assert [button.elem_id for button in buttons] == ["what-runs"]


def test_what_does_not_fit_there_says_so_without_a_command(panel: AnotherMachine) -> None:
    card, install = panel.view("", "Qwen/Qwen2.5-7B-Instruct", 2, 8)
    assert 'data-verdict="over"' in card
    assert "Any one of these changes makes it fit" in card
    assert not install.visible
    problem, install = panel.view("", "a b", 6, 16)
    assert "&#x27;a b&#x27; is not the name of a model." in problem
    assert not install.visible


def test_the_table_is_one_click_with_two_files(panel: AnotherMachine) -> None:
    table, files, table_file, drawing = panel.show_table(16)
    assert table.count("<tr>") == 1 + len(CATALOG)
    assert "fp16 · " in table
    assert files.visible
    assert Path(table_file.value["path"] if isinstance(table_file.value, dict) else table_file.value).suffix == ".csv"
    assert Path(drawing.value["path"] if isinstance(drawing.value, dict) else drawing.value).suffix == ".png"


def test_the_plan_is_in_the_visitors_language(panel: AnotherMachine) -> None:
    before = LANGUAGE.set("pt")
    try:
        card, _ = panel.view("t4", "demo", 6, 16)
    finally:
        LANGUAGE.reset(before)
    assert "não pode ser executado aqui" in card
    assert "cannot be run here" not in card
