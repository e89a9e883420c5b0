"""The Colab notebook: what it promises of itself, and all of it executed, with the demo model in the 7B's place."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spaces_config import address

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[1] / "spaces_config" / "colab.ipynb"
PREINSTALLED = {"transformers": "5.15.0", "gradio": "6.24.0", "torch": "2.11.0", "accelerate": "1.14.0", "safetensors": "0.8.0",
                "huggingface_hub": "1.27.0", "numpy": "2.1.3", "pillow": "11.3.0", "psutil": "5.9.5"}  # fmt: skip
"""Of Colab's image of August 2026."""


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def fill(book: Any, **values: Any) -> Any:
    """The notebook with its forms filled in, which is what Colab does: the line with #@param gets another value."""
    left = set(values)
    for cell in book.cells:
        for name, value in values.items():
            cell.source, count = re.subn(rf"^{name} = .*?(?=  #@param)", f"{name} = {value!r}", cell.source, flags=re.M)
            left -= {name} if count else set()
    assert not left
    return book


def test_it_asks_for_a_t4_and_every_cell_is_a_form() -> None:
    book = notebook()
    nbformat.validate(book)
    assert book.metadata.accelerator == "GPU"
    assert book.metadata.colab.gpuType == "T4"
    for cell in book.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert cell.source.startswith("#@title")
            assert cell.outputs == []
    text = "\n".join(cell.source for cell in book.cells)
    assert "bypassing the notebook UI" in text  # the risk of a public link is said
    assert "7B" in text


def test_colabs_own_packages_are_recent_enough_to_stay() -> None:
    from packaging.requirements import Requirement

    lines = (NOTEBOOK.parents[1] / "requirements.txt").read_text().splitlines()
    wanted = {one.name: one for one in map(Requirement, filter(None, lines))}
    refused = [
        name for name, version in PREINSTALLED.items() if name in wanted and version not in wanted[name].specifier
    ]
    assert refused == []


def test_badge_and_notebook_name_one_repository_which_one_command_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(address.addresses()) == 1
    for name in address.PLACES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(address.ROOT / name, tmp_path / name)
    address.settle("ada/low.mem", tmp_path)
    assert address.addresses(tmp_path) == {"ada/low.mem"}
    nbformat.validate(nbformat.read(tmp_path / "spaces_config" / "colab.ipynb", as_version=4))
    assert address.main(["https://github.com/ada/lowmem"]) == 2
    assert "write it like ada/lowmem" in capsys.readouterr().err


def test_without_an_address_the_notebook_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *command, **more: pytest.fail("pip was started"))
    (cell,) = [cell for cell in notebook().cells if "REPOSITORY = " in cell.source]
    with pytest.raises(ValueError, match="Write into REPOSITORY"):
        exec(re.sub(r"(?<=github\.com/)[\w-]+", "OWNER", cell.source), {})


OLDER = {"gradio": "6.24.0", "gradio_client": "2.6.0", "transformers": "5.15.0", "tokenizers": "0.22.2",
         "huggingface_hub": "1.27.0"}  # fmt: skip
VISIT = """
from gradio_client import Client
from ui_stub import StubEngine
from lowmem.ui.launch import launch_options
from lowmem.ui.page import build_ui

demo = build_ui(StubEngine(delay=0.001))
_, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **launch_options())
client = Client(url, verbose=False)
client.predict("demo", api_name="/load")
print(client.predict("Hello", {"max_new_tokens": 5}, api_name="/generate")["new_tokens"])
import gradio, transformers
from lowmem.runtime import loader
print(gradio.__version__, transformers.__version__)
demo.close()
"""


def test_the_page_opens_with_colabs_own_gradio(tmp_path: Path) -> None:
    """What the specifiers promise, tried: Colab's older packages in front of those that are installed."""
    wanted = [f"{name}=={version}" for name, version in OLDER.items()]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), *wanted]
    fetched = subprocess.run(command, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"the packages cannot be had: {fetched.stderr[-200:]}")
    root = NOTEBOOK.parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, root, root / "tests")))}
    done = subprocess.run([sys.executable, "-c", VISIT], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:3] == ["5", OLDER["gradio"], OLDER["transformers"]]


@pytest.mark.real
def test_every_cell_runs_with_the_demo_in_the_7bs_place(demo_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book = fill(notebook(), MODEL="demo", NEW_TOKENS=8, CONTEXT=512)
    client = nbclient.NotebookClient(book, timeout=500, kernel_name="python3", resources={"metadata": {"path": "/tmp"}})
    client.execute()
    printed = ["".join(out.get("text", "") for out in cell.get("outputs", ())) for cell in book.cells]
    whole = "\n".join(printed)
    assert "lowmem is installed" in whole
    assert "http://127.0.0.1:" in whole  # the app was opened
    assert re.search(r"ram: predicted \d\.\d\d GB, measured \d\.\d\d GB", whole)
    assert re.search(r"then \d+\.\d tokens a second", whole)
    predicted, measured = map(float, re.search(r"ram: predicted (\S+) GB, measured (\S+) GB", whole).groups())  # type: ignore[union-attr]
    assert measured <= predicted * 1.15
    assert "Freed" in printed[-1]
