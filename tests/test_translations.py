"""Every sentence that a visitor may read has its translation, and every translation its sentence."""

from __future__ import annotations

import pytest
from sentences import sentences

from lowmem.ui.translate import SOURCE, entries, holes, languages

OTHERS = [language for language in languages() if language != SOURCE]


@pytest.mark.parametrize("language", OTHERS)
def test_every_sentence_is_translated(language: str) -> None:
    known = {source for _, source, _ in entries(language)}
    missing = [
        f"{template!r} at {', '.join(places)}" for template, places in sentences().items() if template not in known
    ]
    assert not missing, f"add to lowmem/ui/translations/{language}:\n" + "\n".join(missing)


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
