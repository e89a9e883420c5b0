"""Every text that a visitor may read has its translation, and every translation its text."""

from __future__ import annotations

from pathlib import Path
from string import Formatter

import gradio as gr
import httpx
import pytest
from catalogues import catalogues, compiled, read, texts, unmarked
from ui_stub import StubEngine, close

from lowmem.messages import LANGUAGE, msg, translate
from lowmem.ui.html import learn as render_learn
from lowmem.ui.html.lessons import LESSONS
from lowmem.ui.language import Html, Page, escape, number, shown
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.engine import Choice


@pytest.fixture
def portuguese():
    token = LANGUAGE.set("pt")
    yield
    LANGUAGE.reset(token)


@pytest.mark.parametrize("path", catalogues(), ids=lambda path: path.parts[-3])
class TestCatalogue:
    def test_every_text_is_translated_and_every_translation_needed(self, path: Path) -> None:
        catalogue, wanted = read(path), dict(texts())
        entries = {message.id: message for message in catalogue if message.id}
        missing = [f"{text!r} of {file}" for text, file in wanted.items() if text not in entries]
        assert not missing, "run tests/catalogues.py, then translate:\n" + "\n".join(missing)
        assert not entries.keys() - wanted.keys(), "run tests/catalogues.py"
        assert not catalogue.obsolete
        for text, message in entries.items():
            assert message.string, f"{text!r} is not translated"
            assert message.string.strip(" ") == message.string or text.strip(" ") != text, text
            assert not message.fuzzy, text

    def test_placeholders_agree(self, path: Path) -> None:
        for message in read(path):
            if message.id and '{"' not in message.id:  # which is JSON
                assert placeholders(message.string) == placeholders(message.id), message.id

    def test_it_is_compiled(self, path: Path) -> None:
        assert path.with_suffix(".mo").read_bytes() == compiled(read(path)), "run tests/catalogues.py"


def test_what_is_shown_is_a_message() -> None:
    assert list(unmarked()) == []


def placeholders(template: str) -> set[tuple[str | None, ...]]:
    return {(name, form, kind) for _, name, form, kind in Formatter().parse(template) if name is not None}


@pytest.mark.usefixtures("portuguese")
def test_messages_are_translated_where_they_enter_html() -> None:
    assert escape(msg("Stop")) == "Parar"
    assert escape("<Stop>") == "&lt;Stop&gt;"  # somebody's text, and no message
    assert number(1234.5, ",.1f") == "1.234,5"
    plan = StubEngine().plan(Choice(model="demo"))
    assert translate(plan.sentence()).startswith("Cabe: ")
    assert "," in translate(plan.sentence())


def test_components_change_what_is_shown_and_no_value(portuguese: None) -> None:
    props = {
        "label": msg("Precision"),
        "choices": [(msg("Automatic"), "auto"), ("int8", "int8")],
        "value": "Stop",
        "__type__": "update",
    }
    assert shown(props) == props | {"label": "Precisão", "choices": [("Automático", "auto"), ("int8", "int8")]}
    assert shown([gr.Button(msg("Stop"), render=False), "Stop"])[0]["value"] == "Parar"
    assert shown(Html(lambda: escape(msg("Stop")))) == "Parar"
    LANGUAGE.set("en")
    assert shown(props) is props


def served(demo: Page, accept: str) -> str:
    """The page's configuration as this browser gets it."""
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        return httpx.get(f"{url}config", headers={"accept-language": accept}).text
    finally:
        close(demo)


def test_the_page_is_sent_in_the_visitors_language_or_in_the_one_that_was_set() -> None:
    assert "Orçamento" not in served(build_ui(StubEngine()), "en-US")
    page = build_ui(StubEngine())
    page.language = "pt"
    config = served(page, "en-US")
    assert "Tokens de prompt e resposta" in config
    assert "Tokens of prompt and answer" not in config


@pytest.mark.parametrize("key", LESSONS)
def test_a_lesson_counts_with_the_model_at_hand(key: str, portuguese: None) -> None:
    plan = StubEngine().plan(Choice(model="demo"))
    told = render_learn.lesson(key, plan, None)
    assert plan.spec.name in told
    assert "lm-sizes" in told
    assert "O que faz" in told
    LANGUAGE.set("en")
    assert ("module" in render_learn.lesson(key, plan, None)) == bool(LESSONS[key].typical)
