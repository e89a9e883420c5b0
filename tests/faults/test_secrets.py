"""Planted secrets and prompts: looked for in everything that a page writes, says and hands on."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from ui_stub import StubEngine, close

from faults import load
from lowmem.machine.child import Child
from lowmem.settings import child_environment
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.access import Access

HUB_TOKEN, API_KEY, PASSWORD = "hf_plantedhubtoken", "sk-plantedapikey", "planted-password"
PUSH_TOKEN, WRONG_PASSWORD = "hf_plantedpushtoken", "planted-typo"
SECRETS = (HUB_TOKEN, API_KEY, PASSWORD, PUSH_TOKEN, WRONG_PASSWORD)
ENVIRONMENT = {
    "HF_TOKEN": HUB_TOKEN,
    "SOME_API_KEY": API_KEY,
    "DATABASE_PASSWORD": PASSWORD,
    "AWS_SECRET_ACCESS_KEY": API_KEY,
}


def test_children_get_no_secret_that_they_do_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for environment in (child_environment(), child_environment(hub=True)):
        assert environment["TOKENIZERS_PARALLELISM"] == "false"
        assert environment["PATH"] == os.environ["PATH"]
        assert {API_KEY, PASSWORD}.isdisjoint(environment.values())
    assert "HF_TOKEN" not in child_environment()
    assert child_environment(hub=True)["HF_TOKEN"] == HUB_TOKEN
    child = Child("lowmem.generate.template_process")
    try:
        assert child.output.readline() == b"ready\n"
        assert not [secret for secret in SECRETS if secret in Path(f"/proc/{child.pid}/environ").read_text()]
    finally:
        child.end()


class Run:
    """A public page that was used: where it wrote, and what it said to others than who wrote the prompts."""

    def __init__(self, home: Path) -> None:
        self.home, self.said, self.children = home, dict[str, str](), dict[str, str]()
        self.word = "zorv0001ex"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Visitors chat, send files, quantize, fail and leave; the owner tries to push."""
    home = tmp_path_factory.mktemp("secrets")
    found = Run(home)
    reference = load.save_toy(home / "models")
    (home / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "TMPDIR": str(home / "tmp")}.items():
            patch.setenv(name, value)
        patch.setitem(load.ACCOUNT, "password", PASSWORD)
        port = load._free_port()
        with load.served(home, port, home / "page.log") as page:
            asyncio.run(_used(f"http://{load.HOST}:{port}", page, reference, found))
    return found


async def _used(url: str, page: psutil.Process, model: str, found: Run) -> None:
    report = load.Report(0, "many", 3)
    writer, reader, owner = (load.Visitor(number, url, f"127.0.1.{number}", model, report) for number in (1, 2, 3))
    wrong = await reader.http.post(f"{url}/login", data={"username": "guest", "password": WRONG_PASSWORD})
    assert wrong.status_code == 400
    for one in (writer, reader):
        await one.arrive()
    password = re.search(r"owner with (\S+)", (found.home / "page.log").read_text())
    assert password
    await owner.http.post(f"{url}/login", data={"username": "owner", "password": password[1]})
    owner.layout, owner.session = reader.layout, "owner"
    await writer.call("load", model=model, precision="fp32", context=512)
    for act in (writer.chats, writer.chats_on_the_page, writer.uploads, writer.stops):
        await act()
    quantized = await _outcome(writer, "quantize", model=model, method="rtn", group_size=32)
    assert "folder" in quantized, quantized
    for name, values in {
        "chat": {"message": f"{writer.word} too long", "options": {"max_new_tokens": 10**9}},
        "generate": {"prompt": f"{writer.word} wrong", "options": {"seed": writer.word}},
        "hidden_states": {"text": f"{writer.word} " * 20, "window": 4096},
        "perplexity": {"address": f"http://127.0.0.1:1/{writer.word}"},
    }.items():
        outcome = await _outcome(writer, name, **values)
        assert "WRONG" in outcome, outcome
    folder = str(found.home / "outputs" / "mine")
    shutil.copytree(model, folder)
    for name, one in (("owner", owner), ("visitor", writer)):
        found.said[f"push by the {name}"] = await _outcome(one, "push", folder=folder, repo="me/mine", token=PUSH_TOKEN)
    for child in page.children(recursive=True):
        with suppress(psutil.Error, OSError):
            about = Path(f"/proc/{child.pid}")
            found.children[f"{child.pid} {child.cmdline()[-1]}"] = "\n".join(
                (about / one).read_bytes().decode(errors="replace") for one in ("environ", "cmdline", "fd/2")
            )
    for address in (
        "/config",
        "/gradio_api/info",
        "/gradio_api/openapi.json",
        "/",
        "/gradio_api/api_info",
        "/theme.css",
    ):
        found.said[address] = (await reader.http.get(f"{url}{address}")).text
    for name in ("receipt", "machine", "models", "stored"):
        for who in (reader, owner):
            found.said[f"{name} {who.number}"] = await _outcome(who, name)
    found.said["receipt of the writer"] = (await _outcome(writer, "receipt")).replace(found.word, "")
    for one in (writer, reader, owner):
        await one.leave()
        await one.http.aclose()


async def _outcome(visitor: load.Visitor, name: str, **values: Any) -> str:
    """The last answer of an endpoint, or the sentence instead of it."""
    try:
        return str(await visitor.call(name, **values))
    except load.Wrong as sentence:
        return f"WRONG: {sentence}"


def test_the_page_says_no_secret_and_nobody_elses_prompt(run: Run) -> None:
    assert len(run.said) > 12
    assert "reserved for the owner" in run.said["push by the visitor"]
    assert "WRONG" in run.said["push by the owner"]
    for where, text in run.said.items():
        assert text, where
        assert not [secret for secret in (*SECRETS, run.word) if secret in text], where


def test_the_log_has_no_secret_and_no_prompt(run: Run) -> None:
    printed = (run.home / "page.log").read_text()
    assert "As the owner" in printed
    assert not [secret for secret in (*SECRETS, run.word) if secret in printed]


def test_no_file_has_a_secret_and_only_the_writers_own_have_prompts(run: Run) -> None:
    files = [file for file in run.home.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        assert not [secret for secret in SECRETS if secret.encode() in content], file
        own = any(re.fullmatch(r"(.*-)?[0-9a-f]{32,64}", part) for part in file.relative_to(run.home).parts)
        assert own or run.word.encode() not in content, file


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_hold_no_secret(run: Run) -> None:
    assert any("lowmem.runtime" in one for one in run.children), list(run.children)
    for child, about in run.children.items():
        assert not [secret for secret in SECRETS if secret in about], child
        assert run.word not in about, child


STORED = """async () => {
    const stored = {local: {...localStorage}, session: {...sessionStorage}, cookies: document.cookie, url: location.href};
    stored.databases = (await indexedDB.databases()).map(one => one.name);
    stored.caches = await caches.keys();
    stored.history = history.state;
    return JSON.stringify(stored);
}"""


@pytest.fixture
def signed_in() -> Iterator[str]:
    engine = StubEngine(access=Access(public=True, owner="owner"))
    demo: gr.Blocks = build_ui(engine)
    _, url, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, auth=[("owner", PASSWORD)], **launch_options(public=True)
    )
    yield url
    close(demo)


@pytest.mark.browser
@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="chromium is not installed")
def test_the_browser_stores_no_secret_and_no_prompt(signed_in: str, tmp_path: Path) -> None:
    """In storage, in cookies that a script can read, and in the profile on disk."""
    from test_browser import CHROMIUM, FLAGS, playwright_api

    prompt = "What about zorv0001ex?"
    with playwright_api.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS
        )
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(signed_in)
        page.fill("input[type=text], textarea", "owner")
        page.fill("input[type=password]", PASSWORD)
        page.keyboard.press("Enter")
        page.wait_for_selector("body.lm-settled")
        page.click("#load:not([disabled])")
        page.fill("#message textarea", prompt)
        page.keyboard.press("Enter")
        page.wait_for_selector("#chat .bot")
        page.click("#message .stop-button")
        page.wait_for_selector("#message .submit-button")
        page.click("#tabs button[role=tab]:has-text('Quantize') >> nth=0")
        page.evaluate("document.querySelectorAll('[id*=push] button.label-wrap').forEach(one => one.click())")
        page.evaluate(
            "token => document.querySelectorAll('[id*=push-token] input').forEach(one => {"
            "one.value = token; one.dispatchEvent(new Event('input', {bubbles: true}))})",
            PUSH_TOKEN,
        )
        page.wait_for_timeout(500)
        stored = page.evaluate(STORED)
        cookies = context.cookies()
        context.close()
    assert "zorv" not in stored
    assert not [secret for secret in SECRETS if secret in stored + str(cookies)]
    assert all(one["httpOnly"] for one in cookies if "token" in one["name"]), cookies
    kept = [file for file in (tmp_path / "profile").rglob("*") if file.is_file()]
    assert kept
    for file in kept:
        content = file.read_bytes()
        assert not [word for word in (*SECRETS, "zorv0001ex") if word.encode() in content], file
