"""The documents: what they tell people to type is understood, what they link to is there, tables are the measured ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import tables
from lowmem.__main__ import parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/usage.md", "docs/hosting.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "BENCHMARKS.md")
COMMAND = re.compile(r"^    (?:python -m )?lowmem (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def commands() -> list[str]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
    return [line for text in texts for line in COMMAND.findall(text)]


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str) -> None:
    words = shlex.split(re.split(r" {4,}|#", line)[0])  # what follows is a remark
    parser().parse_args(words)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    document = ROOT / name
    missing = [to for to in LINK.findall(document.read_text(encoding="utf-8")) if not (document.parent / to).exists()]
    assert not missing


def test_the_front_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("name", ["BENCHMARKS.md", "README.md"])
def test_tables_are_those_that_were_measured(name: str) -> None:
    made = {"BENCHMARKS.md": tables.benchmarks, "README.md": tables.readme}[name]()
    assert (ROOT / name).read_text(encoding="utf-8") == made, "python -m benchmarks.tables"


def test_a_table_whose_run_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"promise.json is missing: python -m benchmarks.promise"):
        tables.benchmarks()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_that_is_named_exists(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:lowmem|tests|benchmarks|spaces_config|docs)/[\w./-]+)`", text)
    assert [path for path in named if "NAME" not in path and not (ROOT / path).exists()] == []
