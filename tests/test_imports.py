"""The layers: planning works without torch, only the interface knows gradio, only settings reads the environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowmem

PACKAGE = Path(lowmem.__file__).parent
SOURCES = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
HEAVY = ("torch", "transformers", "gradio")


def modules_of(*packages: str) -> list[str]:
    names = (name.removesuffix(".__init__") for name in SOURCES)
    return sorted(name for name in names if name.startswith(packages))


PLANNING = [
    "lowmem",
    *modules_of("lowmem.planning", "lowmem.machine"),
    *("lowmem.models.spec", "lowmem.models.catalog", "lowmem.models.source"),
    *("lowmem.generate.options", "lowmem.settings", "lowmem.fields", "lowmem.units", "lowmem.events", "lowmem.errors"),
]


def imported(modules: list[str]) -> set[str]:
    """The heavy packages that a fresh process holds after importing `modules`."""
    return held_after(f"import importlib; [importlib.import_module(name) for name in {modules!r}]")


def held_after(code: str) -> set[str]:
    code += "\nimport sys\n"
    code += f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_planning_imports_nothing_heavy() -> None:
    assert imported(PLANNING) == set()


def test_the_interface_imports_no_torch() -> None:
    assert imported(modules_of("lowmem.ui")) <= {"gradio"}


def test_public_names_resolve_without_torch() -> None:
    assert held_after("import lowmem; [getattr(lowmem, name) for name in lowmem.__all__ if name != 'Session']") == set()


def import_names(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, at any depth, by statement or by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name.split(".")[0] for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield module.split(".")[0]
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module.split(".")[0]


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_only_the_interface_imports_gradio_and_it_imports_no_torch(module: str) -> None:
    forbidden = {"torch", "transformers"} if module.startswith("lowmem.ui") else {"gradio", "gradio_client"}
    assert not forbidden & set(import_names(SOURCES[module]))


def environment_reads(path: Path) -> Iterator[int]:
    """Lines that read one variable; handing the whole environment to a child is not reading it."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="getenv"):
                yield node.lineno
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id="os"), attr="environ"), attr="get"):
                yield node.lineno
            case ast.Subscript(value=ast.Attribute(value=ast.Name(id="os"), attr="environ"), ctx=ast.Load()):
                yield node.lineno


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"lowmem.settings"}))
def test_only_settings_read_the_environment(module: str) -> None:
    assert list(environment_reads(SOURCES[module])) == []


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    source = "import gradio.themes\ndef f():\n    from torch import nn\n    importlib.import_module('transformers.x')\n"
    source += "import os\nos.environ.get('A'); os.getenv('B'); os.environ['C']; os.environ['D'] = dict(os.environ)\n"
    (tmp_path / "sample.py").write_text(source)
    assert set(import_names(tmp_path / "sample.py")) == {"gradio", "torch", "transformers", "os"}
    assert len(list(environment_reads(tmp_path / "sample.py"))) == 3
