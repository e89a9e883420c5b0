"""Every sentence that a visitor may read has its translation, and every translation its sentence."""

from __future__ import annotations

import httpx
import pytest
from sentences import sentences
from ui_stub import StubEngine

from lowmem.ui.html import learn as render_learn
from lowmem.ui.html.lessons import LESSONS
from lowmem.ui.i18n.edge import Page, translated
from lowmem.ui.i18n.translate import SOURCE, Catalogue, entries, holes, languages, preferred, translate_html
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui
from lowmem.ui.service.engine import Choice

OTHERS = [language for language in languages() if language != SOURCE]


@pytest.mark.parametrize("language", OTHERS)
def test_every_sentence_is_translated(language: str) -> None:
    known = {source for _, source, _ in entries(language)}
    missing = [
        f"{template!r} at {', '.join(places)}" for template, places in sentences().items() if template not in known
    ]
    assert not missing, f"add to lowmem/ui/i18n/translations/{language}:\n" + "\n".join(missing)


@pytest.mark.parametrize("language", OTHERS)
def test_every_translation_is_needed_once(language: str) -> None:
    needed, seen = sentences().keys(), set[str]()
    for file, source, _ in entries(language):
        assert source in needed, f"{file}.toml: no source string needs {source!r}"
        assert source not in seen, f"{file}.toml: {source!r} is in another file, too"
        seen.add(source)


@pytest.mark.parametrize("language", OTHERS)
def test_holes_agree(language: str) -> None:
    for file, source, target in entries(language):
        assert holes(source) == holes(target), f"{file}.toml: {source!r}"
        assert target.strip() == target != "", f"{file}.toml: {source!r}"
        target.format(*range(holes(source)))


CATALOGUE = Catalogue(
    {
        "Groups of {} do not divide the {} inputs of {}.": "Grupos de {} não dividem as {} entradas de {}.",
        "{} of {}": "{} de {}",
        "{} is {}.": "O valor de {} é {}.",
        "Needs {} of {}, {} more than the budget of {}.": "Precisa de {} de {}, {} acima do orçamento de {}.",
        "A {} budget of {} is too small.": "Um orçamento de {1} de {0} é pequeno demais.",
        "GPU memory": "memória da GPU",
        "Temperature": "Temperatura",
        "Stop": "Parar",
        "Use {} or more.": "Use {} ou mais.",
        "Weights": "Pesos",
    },
    decimal=",",
    thousands=".",
)


@pytest.mark.parametrize(
    ("english", "portuguese"),
    [
        ("Groups of 64 do not divide the 1,000 inputs of fc1.", "Grupos de 64 não dividem as 1.000 entradas de fc1."),
        (
            "Needs 4.25 GB of GPU memory, 250 MB more than the budget of 4.00 GB.",
            "Precisa de 4,25 GB de memória da GPU, 250 MB acima do orçamento de 4,00 GB.",
        ),
        ("A GPU memory budget of 1.5 GB is too small.", "Um orçamento de 1,5 GB de memória da GPU é pequeno demais."),
        ("Temperature is 7.5. Use 0 or more.", "O valor de Temperatura é 7,5. Use 0 ou mais."),
        ("3.21 GB of 7,000 MB", "3,21 GB de 7.000 MB"),
        ("Weights 1.25 GB, KV 12 MB", "Pesos 1,25 GB, KV 12 MB"),
        ("12.5 tok/s", "12,5 tok/s"),
        ("+3.1 %", "+3,1 %"),
        ("Stop", "Parar"),
    ],
)
def test_sentences_are_found_by_their_templates(english: str, portuguese: str) -> None:
    assert CATALOGUE.find(english) == portuguese


@pytest.mark.parametrize(
    "unknown", ["Qwen2.5-7B-Instruct", "a letter of complaint", "127.0.0.1", "The sky is full of stars.", "2.13.0"]
)
def test_what_is_not_known_stays(unknown: str) -> None:
    assert CATALOGUE.find(unknown) in (None, unknown)


def test_html_keeps_its_tags_and_what_others_wrote() -> None:
    source = (
        '<div lang="en" aria-label="Free" class="Free"><p> Stop </p><td translate="no"><b>Stop</b></td>'
        "<style>Stop</style><i>1,234.5 MB</i>&lt;Stop&gt;</div>"
    )
    assert translate_html(source, "pt") == (
        '<div lang="pt-BR" aria-label="Livre" class="Free"><p> Parar </p><td translate="no"><b>Stop</b></td>'
        "<style>Stop</style><i>1.234,5 MB</i>&lt;Stop&gt;</div>"
    )
    assert translate_html(source, SOURCE) == source


def test_properties_change_what_is_shown_and_no_value() -> None:
    props = {
        "label": "Precision",
        "choices": [("Automatic", "auto"), ("int8", "int8")],
        "value": "auto",
        "__type__": "update",
    }
    changed = translated("dropdown", props, "pt")
    assert changed == props | {"label": "Precisão", "choices": [("Automático", "auto"), ("int8", "int8")]}
    assert translated("textbox", "Stop", "pt") == "Stop"
    assert translated("button", "Stop", "pt") == "Parar"
    assert translated("html", "<p>Stop</p>", "pt") == "<p>Parar</p>"


@pytest.mark.parametrize(
    ("accept", "language"),
    [
        ("pt-BR,pt;q=0.9,en;q=0.8", "pt"),
        ("en-US,en;q=0.9,pt;q=0.1", "en"),
        ("de, pt;q=0.3", "pt"),
        ("fr", "en"),
        ("", "en"),
    ],
)
def test_a_browser_is_answered_in_its_language(accept: str, language: str) -> None:
    assert preferred(accept) == language


def served(demo: Page, accept: str) -> str:
    """The page's configuration as this browser gets it."""
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
    try:
        return httpx.get(f"{url}config", headers={"accept-language": accept}).text
    finally:
        demo.close()


def test_the_page_is_sent_in_the_visitors_language_or_in_the_one_that_was_set() -> None:
    assert "Orçamento" not in served(build_ui(StubEngine()), "en-US")
    page = build_ui(StubEngine())
    page.language = "pt"
    config = served(page, "en-US")
    assert "Tokens de prompt e resposta" in config
    assert "Tokens of prompt and answer" not in config


@pytest.mark.parametrize("key", LESSONS)
def test_a_lesson_counts_with_the_model_at_hand(key: str) -> None:
    plan = StubEngine().plan(Choice(model="demo"))
    told = render_learn.lesson(key, plan, None)
    assert plan.spec.name in told
    assert "lm-sizes" in told
    assert ("module" in told) == bool(LESSONS[key].typical)
    assert "O que faz" in translate_html(told, "pt")
