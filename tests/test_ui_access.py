"""A shared page: signing in, what visitors may not do, and how often. Against a launched app with a stub engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError, AuthenticationError
from ui_stub import StubEngine, close

from lowmem.errors import BadInput, NotAllowed
from lowmem.events import CancelToken
from lowmem.generate.options import GenerateOptions
from lowmem.ui.launch import launch_options, serve
from lowmem.ui.page import build_ui
from lowmem.ui.service import rate_limits as limits
from lowmem.ui.service.access import MOST_TOKENS, UNBOUNDED, Access
from lowmem.ui.service.rate_limits import MOST_BODY_BYTES, RULES, Counter, Rule, VisitorLimits
from lowmem.ui.service.results import push_result

VISITOR, OWNER = ("ada", "secret"), ("owner", "own secret")
TIGHT = ("Qwen/Qwen2.5-7B-Instruct", "auto", 512, "auto", "same", "1G", "")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = StubEngine(delay=0.001, access=Access(public=True, owner="owner", any_model=False))
    demo = build_ui(engine)
    options = launch_options(public=True)
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, auth=[VISITOR, OWNER], **options)
    yield address
    close(demo)


@pytest.fixture(autouse=True)
def _no_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file are a visitor in a hurry; those of the rules bring their own."""
    monkeypatch.setattr(limits, "RULES", ())


@pytest.fixture(scope="module")
def visitor(url: str) -> Client:
    return Client(url, auth=VISITOR, verbose=False)


@pytest.fixture(scope="module")
def owner(url: str) -> Client:
    return Client(url, auth=OWNER, verbose=False)


def test_nobody_comes_in_without_the_password(url: str) -> None:
    for wrong in (None, ("ada", "guess"), ("owner", "secret")):
        with pytest.raises((AuthenticationError, ValueError)):
            Client(url, auth=wrong, verbose=False)
    assert httpx.post(f"{url}gradio_api/queue/join", json={}).status_code == 401


def test_a_visitor_chats(visitor: Client) -> None:
    visitor.predict("demo", api_name="/load")
    assert visitor.predict("Hello", options={"max_new_tokens": 5}, api_name="/chat")["new_tokens"] == 5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ((*TIGHT, True, "/load"), "Going over the budget is reserved for the owner"),
        (("stranger/model", "/load"), "This page runs only the models it lists; 'stranger/model' is not one of them."),
        (("stranger/model", "/plan"), "This page runs only the models it lists"),
        (("stranger/model", "rtn", "/quantize"), "This page runs only the models it lists"),
        (("stranger/model", ["fp32"], "/compare"), "This page runs only the models it lists"),
        (("stranger/model", "/compare_strategies"), "This page runs only the models it lists"),
        (("stranger/model", "/inspect_weights"), "This page runs only the models it lists"),
        (("stranger/model", "/offload_plan"), "This page runs only the models it lists"),
        (("The sky", "stranger/model", "/offload"), "This page runs only the models it lists"),
        (("The sky", "stranger/model", "/offload_compare"), "This page runs only the models it lists"),
        (("stranger/model", "/estimate_export"), "This page runs only the models it lists"),
        (("stranger/model", "/export"), "This page runs only the models it lists"),
        ((["stranger/model"], ["fp32"], "/sweep"), "This page runs only the models it lists"),
        (("models/demo", "/delete"), "Deleting from this machine is reserved for the owner"),
        (("demo", "", "", "", "", 1, True, "/offload_plan"), "Measuring this machine again is reserved for the owner"),
        (("/stored",), "Listing the disk is reserved for the owner"),
        (("/etc", "me/it", "/push"), "Pushing to the hub is reserved for the owner"),
        (("demo", {"tokens": 5000}, "/compare_strategies"), "5,000 tokens of text are more than the 4,096"),
        (("Hi", {"max_new_tokens": 5000}, "/generate"), "5,000 new tokens are more than the 4,096"),
        ((["Hi"] * 101, "/batch"), "101 prompts are more than the 100"),
    ],
)
def test_what_is_left_to_the_owner(visitor: Client, call: tuple[Any, ...], sentence: str) -> None:
    visitor.predict("demo", api_name="/load")
    *values, endpoint = call
    with pytest.raises(AppError, match=sentence):
        visitor.predict(*values, api_name=endpoint)


def test_the_owner_may(owner: Client) -> None:
    assert owner.predict(*TIGHT, True, api_name="/load")["receipt"]["action"] == "load"
    assert len(owner.predict(["Hi"] * 101, api_name="/batch")["results"]) == 101
    with pytest.raises(AppError, match="HF_HUB_OFFLINE"):  # allowed, and there is no hub here
        owner.predict("stranger/model", api_name="/plan")


def test_outside_an_event_nobody_owns_a_public_page(tmp_path: Path) -> None:
    access = Access(public=True, owner="owner")
    with pytest.raises(NotAllowed, match="Pushing to the hub"):
        next(push_result(access, str(tmp_path), "a/b", "token", True, CancelToken()))
    with pytest.raises(NotAllowed, match="new tokens"):
        access.check_work(GenerateOptions(max_new_tokens=10_000))
    assert Access().owned
    assert (access.longest, Access().longest) == (MOST_TOKENS, UNBOUNDED)


# --- how often and how much


def test_a_counter_lets_pass_again_when_time_has_passed() -> None:
    now = 0.0
    counter, rule = Counter(lambda: now), Rule("tries", ("/login",), 3, 60)
    assert [counter.wait(rule, "1.2.3.4") for _ in range(4)] == [0.0, 0.0, 0.0, 60.0]
    assert counter.wait(rule, "5.6.7.8") == 0.0
    now = 60.0
    assert counter.wait(rule, "1.2.3.4") == 0.0


def test_many_addresses_share_a_bound_of_their_own() -> None:
    counter, rule = Counter(lambda: 0.0), Rule("tries", ("/login",), 3, 60)
    waits = [counter.wait(rule, f"10.0.0.{number}") for number in range(3 * limits.ALL_ADDRESSES + 5)]
    assert waits.count(0.0) == 3 * limits.ALL_ADDRESSES


def test_tries_of_a_password_come_to_an_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RULES[0].count <= 10
    monkeypatch.setattr(limits, "RULES", (replace(RULES[0], what="tries"),))
    tries = [httpx.post(f"{url}login", data={"username": "ada", "password": str(guess)}) for guess in range(11)]
    assert [answer.status_code for answer in tries] == [400] * 10 + [429]
    assert tries[-1].json()["detail"].startswith("Too many tries from your address: 10 in 300 s.")
    assert int(tries[-1].headers["retry-after"]) > 250


def test_too_many_actions_are_refused(visitor: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = next(rule for rule in RULES if rule.what == "actions")
    monkeypatch.setattr(limits, "RULES", (replace(actions, what="clicks", count=3),))
    for _ in range(3):
        visitor.predict(api_name="/receipt")
    with pytest.raises(httpx.HTTPStatusError, match="429"):
        visitor.predict(api_name="/receipt")


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_has_a_size(url: str, visitor: Client, declared: bool) -> None:
    body = b"x" * (MOST_BODY_BYTES + 1)
    content = body if declared else (body[start : start + 1_000_000] for start in range(0, len(body), 1_000_000))
    try:
        status = httpx.post(f"{url}gradio_api/queue/join", content=content, cookies=visitor.cookies).status_code
    except httpx.HTTPError:  # the connection is closed in the middle of the body
        status = 413
    assert status in (413, 400)


def test_a_space_tells_visitors_apart_by_what_its_proxy_says(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = {"headers": [(b"x-forwarded-for", b"1.2.3.4, 10.0.0.1")], "client": ("10.0.0.9", 1)}
    assert limits.address_of(scope) == "10.0.0.9"
    monkeypatch.setenv("SYSTEM", "spaces")
    assert limits.address_of(scope) == "1.2.3.4"


# --- launching


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def launch(self: Any, **kwargs: Any) -> tuple[Any, str, str]:
        seen.update(kwargs, page=self)
        return None, "http://127.0.0.1:7860/", "https://x.gradio.live"

    monkeypatch.setattr("gradio.Blocks.launch", launch)
    monkeypatch.setattr("lowmem.ui.launch.measure_runtime_bytes", lambda: 0)
    return seen


def test_sharing_implies_a_password_and_prints_it_once(
    launched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    serve(share=True)
    (user, password), (owner, own) = launched["auth"]
    printed = capsys.readouterr().out
    assert (user, owner) == ("lowmem", "owner")
    assert min(len(password), len(own)) >= 12
    assert printed.count(password) == printed.count(own) == 1
    assert VisitorLimits in [one.cls for one in launched["app_kwargs"]["middleware"]]


def test_a_sign_in_of_ones_own(launched: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    serve(auth="ada:secret")
    assert launched["auth"] == [("ada", "secret")]
    assert VisitorLimits not in [one.cls for one in launched["app_kwargs"]["middleware"]]
    serve(share=True, auth="ada:secret")
    assert launched["auth"][0] == ("ada", "secret")
    assert "secret" not in capsys.readouterr().out.replace(launched["auth"][1][1], "")
    serve()
    assert launched["auth"] is None
    for wrong in ("ada", ":x", "ada:"):
        with pytest.raises(BadInput, match="lacks a user name or a password"):
            serve(auth=wrong)
    with pytest.raises(BadInput, match="page's owner"):
        serve(share=True, auth="owner:x")


def test_a_token_of_the_owner_is_not_spent_on_strangers_models(
    launched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rules: list[Access] = []
    monkeypatch.setattr("lowmem.ui.launch.Engine", lambda access: rules.append(access) or StubEngine(access=access))
    serve(share=True)
    monkeypatch.setenv("HF_TOKEN", "own")
    serve(share=True)
    assert [rule.any_model for rule in rules] == [True, False]
