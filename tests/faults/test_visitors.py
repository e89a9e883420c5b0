"""Two visitors of one page: neither finds what the other wrote, and neither goes over the owner's budget."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from gradio.context import LocalContext
from gradio_client import Client
from gradio_client.exceptions import AppError
from ui_stub import StubEngine, close

from lowmem.errors import BadInput, NotAllowed
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.settings import settings
from lowmem.ui.api.endpoints import ENDPOINTS
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.parts.worker import StopTokens
from lowmem.ui.service.access import OWNER, Access, Visitor
from lowmem.ui.service.engine import Engine
from lowmem.ui.service.results import new_folder, result_folder
from lowmem.units import GB

PLANTED = "xylophonic"
SIGN_INS = [("ada", "secret"), ("owner", "own")]
CEILING = 2 * GB


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, gr.Blocks, StubEngine]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWMEM_HOME", str(tmp_path_factory.mktemp("home")))
        engine = StubEngine(delay=0.001, access=Access(public=True, owner="owner"))
        engine.ceiling = MemoryBudget(ram=CEILING)
        demo = build_ui(engine)
        _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, auth=SIGN_INS, **launch_options(public=True))
        yield url, demo, engine
        close(demo)


def visitor(url: str, name: str = "ada") -> Client:
    return Client(url, auth=(name, dict(SIGN_INS)[name]), verbose=False)


def call(client: Client, endpoint: str, *values: Any, **named: Any) -> str:
    """The answer, or the sentence instead of it."""
    try:
        return json.dumps(client.predict(*values, **named, api_name=f"/{endpoint}"))
    except (AppError, ValueError) as error:
        return str(error)


VALUES = {"prompts": ["Hi"], "models": ["stranger/none"], "variants": ["fp32"], "model": "stranger/none"}


def values(client: Client, endpoint: str) -> dict[str, Any]:
    """Something for each argument without a default, and a model that nothing is fetched for."""
    parameters = client.view_api(return_format="dict")["named_endpoints"][f"/{endpoint}"]["parameters"]  # type: ignore[index]
    needed = [
        one["parameter_name"]
        for one in parameters
        if not one["parameter_has_default"] or one["parameter_name"] == "model"
    ]
    return {name: VALUES.get(name, "Hi") for name in needed}


def test_nobody_finds_what_another_wrote(page: tuple[str, gr.Blocks, StubEngine]) -> None:
    url, _, _ = page
    first, second, owner = visitor(url), visitor(url), visitor(url, "owner")
    first.predict("demo", api_name="/load")
    assert PLANTED in call(first, "generate", f"The {PLANTED} word", {"max_new_tokens": 2})
    assert PLANTED in call(first, "receipt")
    for other in (second, owner):
        for endpoint in (one for one in ENDPOINTS if one.name != "unload"):
            assert PLANTED not in call(other, endpoint.name, **values(other, endpoint.name)), endpoint.name
    assert PLANTED in call(first, "receipt")


def test_the_page_shows_nobody_what_another_wrote(page: tuple[str, gr.Blocks, StubEngine]) -> None:
    """Every handler of the page that answers at once, called as the browser of another visitor would."""
    url, demo, _ = page
    first, second = visitor(url), visitor(url)
    first.predict("demo", api_name="/load")
    call(first, "batch", [f"The {PLANTED} word"], {"max_new_tokens": 2})
    seen = ""
    for number, handler in demo.fns.items():
        if not handler.queue and handler.fn is not None:
            body = {"fn_index": number, "data": [None for _ in handler.inputs], "session_hash": "another"}
            answer = httpx.post(f"{url}gradio_api/run/predict", json=body, cookies=second.cookies, timeout=30)
            assert PLANTED not in answer.text, handler.fn
            seen += answer.text
    assert "MB" in seen
    for address in ("config", "gradio_api/info"):
        assert PLANTED not in httpx.get(f"{url}{address}", cookies=second.cookies).text


def as_visitor(session: str, run: Any, name: str = "ada", headers: Mapping[str, str] = {}) -> Any:
    """Call `run` in the context of a request."""
    scope = {
        "type": "http",
        "client": ("127.0.0.1", 5),
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        "method": "POST",
        "path": "/",
        "query_string": b"",
    }
    from fastapi import Request

    token = LocalContext.request.set(gr.Request(Request(scope), username=name, session_hash=session))
    try:
        return run()
    finally:
        LocalContext.request.reset(token)


def test_results_are_listed_for_who_made_them() -> None:
    engine = Engine(access=Access(public=True, owner="owner"))

    def made(name: str) -> Path:
        folder = engine.access.results / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        return folder

    own, others = as_visitor("a", lambda: made("mine")), as_visitor("b", lambda: made("theirs"))
    owners = as_visitor("o", lambda: made("kept"), "owner")
    assert len(own.parent.name) == 32
    listed = as_visitor("a", lambda: [ref for _, ref in engine.catalog()])
    assert str(own) in listed
    assert str(owners) not in listed
    assert str(others) not in listed
    made_here = own, others, owners
    assert as_visitor("a", lambda: [engine.access.is_private(one) for one in made_here]) == [False, True, True]
    assert as_visitor("a", lambda: [engine.access.may_use(one) for one in made_here]) == [True, True, False]
    assert as_visitor("o", lambda: [engine.access.may_use(one) for one in made_here], "owner") == [True, True, True]
    for access in (engine.access, replace(engine.access, any_model=False)):
        for ref in (str(owners), f"{own}/../../../{owners.name}"):
            with pytest.raises(NotAllowed):
                as_visitor("a", partial(access.check_model, ref))
            as_visitor("o", partial(access.check_model, ref), "owner")
        as_visitor("a", partial(access.check_model, str(own)))
    with pytest.raises(BadInput, match="Only results"):
        as_visitor("a", lambda: result_folder(engine.access, str(owners)))
    assert as_visitor("o", lambda: engine.access.visitor, "owner") == OWNER
    assert as_visitor("", lambda: engine.access.visitor) != as_visitor("", lambda: engine.access.visitor)


def test_a_program_that_uses_mcp_is_known_by_its_secret() -> None:
    access = Access(public=True)

    def identity(**headers: str) -> Visitor:
        sent = {"x-gradio-user": "mcp"} | {name.replace("_", "-"): value for name, value in headers.items()}
        return as_visitor("shared by all tools", lambda: access.visitor, headers=sent)

    assert identity() != identity()
    assert identity(x_lowmem_visitor="short") != identity(x_lowmem_visitor="short")
    assert identity(x_lowmem_visitor="a" * 32) == identity(x_lowmem_visitor="a" * 32)
    assert identity(x_lowmem_visitor="a" * 32) != identity(x_lowmem_visitor="b" * 32)


def test_mcp_gives_each_program_its_own_receipts(tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="gradio[mcp] is not installed")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    engine = StubEngine(delay=0.001, access=Access(public=True))
    demo = build_ui(engine)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, mcp_server=True, **launch_options(public=True))
    seen: list[Visitor] = []
    noted = engine._note
    engine._note = lambda visitor, receipt: (seen.append(visitor), noted(visitor, receipt))  # type: ignore[method-assign]

    async def said(name: str, values: dict[str, Any], address: str, **headers: str) -> str:
        transport = httpx.AsyncHTTPTransport(local_address=address)
        factory = lambda headers=None, timeout=None, auth=None: httpx.AsyncClient(  # noqa: E731
            headers=headers, timeout=timeout, transport=transport, follow_redirects=True
        )
        named = {one.replace("_", "-"): value for one, value in headers.items()} | {"x-forwarded-for": "9.9.9.9"}
        client = streamablehttp_client(f"{url}gradio_api/mcp/", named, httpx_client_factory=factory)
        async with client as (reading, writing, _), ClientSession(reading, writing) as session:
            await session.initialize()
            return str(await session.call_tool(name, values))

    async def ask() -> list[str]:
        first, second = {"x_lowmem_visitor": "f" * 20}, {"x_lowmem_visitor": "s" * 20}
        prompt = {"prompt": f"The {PLANTED} word", "options": {"max_new_tokens": 2}}
        await said("load", {"model": "demo"}, "127.0.0.7", **second)
        await said("generate", prompt, "127.0.0.7", **first)
        await said("generate", prompt, "127.0.0.8")
        return [await said("receipt", {}, "127.0.0.7", **one) for one in (first, second, {})]

    try:
        receipts = asyncio.run(ask())
    finally:
        close(demo)
    assert [PLANTED in one for one in receipts] == [True, False, False]
    assert [one.address for one in seen[-2:]] == ["127.0.0.7", "127.0.0.8"]


def test_results_of_the_owner_are_not_served(
    page: tuple[str, gr.Blocks, StubEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, demo, _ = page
    monkeypatch.setenv("LOWMEM_HOME", str(Path(demo.allowed_paths[0]).parent))
    client = visitor(url)
    named, secret = settings().outputs / "model-gptq-4bit", new_folder("batch")
    for folder in (named, secret):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(PLANTED)
    for path in (
        f"file={named}/config.json",
        f"file={secret}/../{named.name}/config.json",
        f"file/{named}/config.json",
    ):
        for address in (f"{url}gradio_api/{path}", f"{url}{path}"):
            assert httpx.get(address, cookies=client.cookies, follow_redirects=True).status_code in (403, 404), address
    assert httpx.get(f"{url}gradio_api/file={secret}/config.json", cookies=client.cookies).text == PLANTED


def test_stop_ends_nobody_elses_work() -> None:
    tokens = StopTokens()
    mine, other = gr.Request(session_hash="a"), gr.Request(session_hash="b")
    token = tokens.begin(mine, "chat")
    tokens.stop(other, "chat")
    tokens.leave(other)
    tokens.stop(gr.Request(), "chat")
    assert not token.cancelled
    tokens.stop(mine, "chat")
    assert token.cancelled


def test_the_owners_budget_binds_everybody(page: tuple[str, gr.Blocks, StubEngine]) -> None:
    url, demo, engine = page
    for client in (visitor(url), visitor(url, "owner")):
        for ram in ("", "7G", "1000G"):
            plan = json.loads(call(client, "plan", "Qwen/Qwen2.5-7B-Instruct", ram=ram))
            assert plan["budgets"]["ram"]["limit"] == CEILING
            assert "more than the budget of 2.00 GB" in call(
                client, "load", "Qwen/Qwen2.5-7B-Instruct", "int8", ram=ram
            )
        assert json.loads(call(client, "plan", "demo", ram="1G"))["budgets"]["ram"]["limit"] == GB
        assert f"{CEILING}" in call(client, "offload_plan", "demo") or "2.00 GB" in call(client, "offload_plan", "demo")
    assert engine.child_budget(UNLIMITED).limit("ram") < CEILING
    slider = next(one for one in demo.blocks.values() if getattr(one, "elem_id", "") == "ram-budget")
    assert (slider.maximum, slider.value) == (2.0, 2.0)


def test_a_ceiling_lowers_and_never_raises() -> None:
    assert MemoryBudget(ram=5).within(MemoryBudget(ram=3)) == MemoryBudget(ram=3)
    assert MemoryBudget(ram=2, vram=9).within(MemoryBudget(ram=3)) == MemoryBudget(ram=2, vram=9)
    assert UNLIMITED.within(MemoryBudget(vram=4)) == MemoryBudget(vram=4)
    with pytest.raises(BadInput, match="budget"):
        MemoryBudget.parse("1M")


def test_quick_endpoints_answer_while_everything_waits(page: tuple[str, gr.Blocks, StubEngine]) -> None:
    url, _, engine = page
    clients = [visitor(url) for _ in range(2)]
    clients[0].predict("demo", api_name="/load")
    engine.stub.delay = 0.02
    try:
        jobs = [client.submit("Hi", {"max_new_tokens": 100}, api_name="/generate") for client in clients * 4]
        assert call(clients[0], "models")
        assert "of your actions run or wait already" in " ".join(
            str(job.exception()) for job in jobs if job.done() or job.exception(60)
        )
        assert sum(job.exception(60) is None for job in jobs) == 6
        notes = [frame.get("note", "") for job in jobs for frame in job.outputs()]
        assert any(note.startswith("Waiting: place ") for note in notes)
    finally:
        engine.stub.delay = 0.001


def test_a_class_signs_in_through_one_address(page: tuple[str, gr.Blocks, StubEngine]) -> None:
    url, _, _ = page
    for number in range(32):
        wrong = number % 4 == 0
        answer = httpx.post(f"{url}login", data={"username": "ada", "password": "typo" if wrong else "secret"})
        assert answer.status_code == (400 if wrong else 200)
    tries = [httpx.post(f"{url}login", data={"username": "ada", "password": "no"}).status_code for _ in range(4)]
    assert tries == [400, 400, 429, 429]
