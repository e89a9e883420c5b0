"""What scripts and agents use: the example of docs/usage.md against the launched app, its arguments, and the MCP tools."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import own_process
import pytest
import toys
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_stub import StubEngine, close

from lowmem.errors import MissingDependency
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.processor import has_vnni
from lowmem.settings import settings
from lowmem.ui.api.arguments import ARGUMENTS, SPECIAL
from lowmem.ui.api.endpoints import ENDPOINTS, RENAMED
from lowmem.ui.launch import launch_options, serve
from lowmem.ui.page import build_ui
from lowmem.ui.service.engine import Engine

USAGE = Path(__file__).parents[1] / "docs" / "usage.md"


def example() -> str:
    text = USAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- example -->\n```python\n(.*?)```\n<!-- /example -->", text, re.DOTALL)
    assert found
    return found[1]


def recorded() -> list[str]:
    found = re.search(r"<!-- output -->\n(.*?)<!-- /output -->", USAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return [line.removeprefix("    ") for line in found[1].strip("\n").splitlines()]


def launched(demo: gr.Blocks, **more: Any) -> str:
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options() | more)
    return url


def run_example(url: str) -> list[str]:
    """What the example prints, asking the app at `url`."""
    code, printed = example().replace("http://127.0.0.1:7860", url), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "usage.md", "exec"), {})
    return printed.getvalue().splitlines()


def test_the_documented_example_runs_on_a_toy() -> None:
    folder = settings().models / "demo"
    toys.save_toy("llama", folder)
    (folder / "source.json").write_text(json.dumps({"ref": "demo", "name": "Toy-Llama", "licence": "mit"}))
    demo = build_ui(Engine())
    try:
        lines = run_example(launched(demo))
    finally:
        close(demo)
    assert lines[0].startswith("Fits")
    assert any(line.startswith("Round to nearest, 4 bits, groups of 32") for line in lines)
    assert sorted(line.split()[0] for line in lines[-3:]) == ["fp32", "int8", "rtn:4:32"]


FIGURE = re.compile(r"(?<![\w:])\d+(?:\.\d+)?(?![\w:])")  # and none of fp32 or rtn:4:32


def words_and_figures(lines: list[str]) -> tuple[list[str], list[float]]:
    """Of what the example prints, but for its second line: the words with a # for each figure, and the figures."""
    plan, _, made, *rows = lines
    plan = plan.partition(" of the ")[0]  # the budget is the machine's
    text = "\n".join([plan, made, *sorted(rows)])  # cells run side by side, and end in either order
    return FIGURE.sub("#", text).splitlines(), [float(figure) for figure in FIGURE.findall(text)]


@pytest.mark.skipif(not has_vnni(), reason="the recorded int8 weights are those of a processor with VNNI")
@pytest.mark.real
def test_the_documented_output_is_that_of_the_demo_model(demo_home: Path) -> None:
    measure_runtime_bytes()
    for stored in (demo_home / "outputs").glob("sweep*"):  # its rows would be printed, not measured
        shutil.rmtree(stored)
    with own_process.app(demo_home) as url:  # what this process holds would count against the budget
        lines = run_example(url)
    words, figures = words_and_figures(lines)
    told, measured = words_and_figures(recorded())
    assert words == told
    assert figures == pytest.approx(measured, rel=0.15)
    # Sums of int8 are rounded differently from CPU to CPU, so an answer may part from the recorded one.
    assert lines[1].split()[0] == recorded()[1].split()[0]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    demo = build_ui(StubEngine(delay=0.002))
    yield Client(launched(demo), verbose=False)
    close(demo)


ACTIONS = {
    "load": ("load", "anyway", "load-less", "quantize-load", "export-load"),
    "unload": ("unload", "unload-bar"),
    "generate": ("completion-start", "long-continue-start"),
    "chat": ("long-chat-run-start",),
    "batch": ("batch-start",),
    "quantize": ("quantize-start",),
    "compare": ("compare-start", "compare-example"),
    "sweep": ("sweep-start",),
    "inspect_weights": ("explain-start",),
    "offload": ("offload-start",),
    "offload_plan": ("offload-again",),
    "offload_compare": ("offload-compare-start",),
    "perplexity": ("long-perplexity-start",),
    "hidden_states": ("long-hidden-start",),
    "recall": ("long-recall-start",),
    "compare_strategies": ("long-strategies-start",),
    "what_runs": ("what-runs",),
    "export": ("export-start",),
    "benchmark": ("benchmark-start",),
    "verify": ("verify-start",),
    "delete": ("delete-stored",),
    "push": ("push-start", "export-push-start"),
}
"""Endpoint -> the page's buttons that do the same."""
VIEWS = {"change-model", "back"}


def test_every_button_has_its_endpoint(client: Client) -> None:
    buttons = [one["props"].get("elem_id", "") for one in client.config["components"] if one["type"] == "button"]
    actions = {button for button in buttons if "stop" not in button} - VIEWS
    assert actions == {button for some in ACTIONS.values() for button in some}
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {f"/{name}" for name in ACTIONS} <= set(endpoints)


def test_every_element_and_every_kind_of_work_has_a_name_of_its_own(client: Client) -> None:
    """Two push boxes share neither an element nor a Stop."""
    names = [one["props"].get("elem_id") for one in client.config["components"]]
    named = [name for name in names if name]
    assert sorted(named) == sorted(set(named))
    assert {"push-token", "export-push-token", "push-stop", "export-push-stop"} <= set(named)


def test_no_argument_is_described_that_there_is_not(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    names = {(path[1:], one["parameter_name"]) for path, made in endpoints.items() for one in made["parameters"]}
    assert {name for _, name in names} == set(ARGUMENTS)
    assert set(SPECIAL) <= names


@pytest.mark.parametrize(
    ("endpoint", "values", "words"),
    [
        ("/sweep", [["demo"], ["fp31"]], "fp31"),
        ("/sweep", [["demo"]], "neither precisions nor methods"),
        ("/sweep", [[], ["fp32"]], "no model"),
        ("/sweep", [["demo"], [], {"rnt": {}}], "'rnt'"),
        ("/sweep", [["demo"], ["fp32"], {}, "/etc/passwd"], "no text"),
        ("/estimate_quantize", ["demo", "magic"], "'magic'"),
        ("/push", ["/etc", "me/it"], "Only results of this page"),
        ("/benchmark", ["/etc"], "Only results of this page"),
        ("/estimate_export", ["demo", "onnx", "int3"], "int3"),
        ("/recall", [], "No model is loaded"),
        ("/verify", [], "No model is loaded"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(client: Client, endpoint: str, values: list, words: str) -> None:
    with pytest.raises(AppError, match=words):
        client.predict(*values, api_name=endpoint)


def test_forecasts_are_plain_numbers(client: Client) -> None:
    made = client.predict("demo", "rtn", api_name="/estimate_quantize")
    assert made["verdict"] == "fits"
    assert 80_000_000 < made["estimate"]["output_bytes"] < 100_000_000
    assert client.predict("demo", api_name="/estimate_export")["disk_bytes"] > 0
    assert "demo" in client.predict(api_name="/models")["models"]


def test_an_earlier_name_answers_and_says_the_new_one(client: Client) -> None:
    assert set(RENAMED.values()) <= {endpoint.name for endpoint in ENDPOINTS}
    made = client.predict("demo", "rtn", api_name="/forecast")
    assert made.pop("renamed") == "/forecast is now called /estimate_quantize; the old name will be removed."
    assert made["output_bytes"] == client.predict("demo", "rtn", api_name="/estimate_quantize")["output_bytes"]


def test_an_earlier_argument_works_and_says_the_new_one(client: Client) -> None:
    made = client.predict("demo", "fp32", kv="int8", api_name="/plan")
    assert made.pop("renamed") == "kv is now called cache_type; the old name will be removed."
    assert made == client.predict("demo", "fp32", cache_type="int8", api_name="/plan")
    assert made["cache_type"] == "int8"


def test_mcp_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="mcp") as caught:
        serve(mcp=True)
    assert "pip install" in caught.value.hint


def test_the_endpoints_are_mcp_tools() -> None:
    pytest.importorskip("mcp", reason="gradio[mcp] is not installed")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    demo = build_ui(StubEngine(delay=0.002))
    address = f"{launched(demo, mcp_server=True)}gradio_api/mcp/"

    async def ask() -> tuple[dict[str, Any], list[Any]]:
        async with streamablehttp_client(address) as (reading, writing, _), ClientSession(reading, writing) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            calls = [("plan", {"model": "demo"}), ("load", {"model": "demo"})]
            calls += [
                ("generate", {"prompt": "The sky", "options": {"max_new_tokens": 5}}),
                ("generate", {"prompt": " "}),
            ]
            return tools, [await session.call_tool(name, given) for name, given in calls]

    try:
        tools, answers = asyncio.run(ask())
    finally:
        close(demo)
    assert {endpoint.name for endpoint in ENDPOINTS} | set(RENAMED) == set(tools)
    assert set(ACTIONS) <= set(tools)
    quantize = tools["quantize"]
    assert "Quantize a model" in quantize.description
    assert quantize.inputSchema["properties"]["group_size"]["type"] in ("number", "integer")
    assert "share a scale" in quantize.inputSchema["properties"]["group_size"]["description"]
    said = ["".join(part.text for part in answer.content) for answer in answers]
    assert "fits" in said[0]
    assert "receipt" in said[1]
    assert "new_tokens" in said[2]
    assert "nothing to send" in said[3]
