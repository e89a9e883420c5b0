"""Spaces: what is assembled, whether the hub and pip would take it, and whether it starts from nothing but itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clean_venv
import own_process
import pytest
import toys
from gradio_client import Client
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from spaces_config import front_matter
from spaces_config.build import ROOT, TARGETS, build, main, requirements

FAKE_SPACES = Path(__file__).parent / "fake_spaces"
ZEROGPU_TORCHES = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")


def readme(target: str) -> dict[str, Any]:
    return front_matter.parse((ROOT / "spaces_config" / f"{target}.md").read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_the_hub_accepts_the_front_matter(target: str) -> None:
    values = readme(target)
    assert front_matter.problems(values) == []
    assert (ROOT / values["app_file"]).is_file()
    gradio = next(Requirement(line) for line in (ROOT / "requirements.txt").read_text().split("\n") if "gradio" in line)
    assert gradio.specifier.contains(values["sdk_version"])
    python = SpecifierSet(">=3.11")
    assert python.contains(
        f"{values['python_version']}.0" if values["python_version"].count(".") < 2 else values["python_version"]
    )


def test_zerogpu_has_pythons_and_torches_of_its_own() -> None:
    assert readme("zerogpu")["python_version"] in front_matter.ZEROGPU_PYTHONS
    wanted = {one.name: one for one in clean_venv.parse(requirements("zerogpu"))}
    assert "spaces" in wanted
    newest = max(ZEROGPU_TORCHES, key=Version)
    assert [version for version in ZEROGPU_TORCHES if wanted["torch"].specifier.contains(version)] == [*ZEROGPU_TORCHES]
    assert not wanted["torch"].specifier.contains(f"{Version(newest).major}.{Version(newest).minor + 1}.0")


def test_what_is_wrong_with_a_front_matter_is_said() -> None:
    wrong = readme("cpu-basic") | {"sdk": "streamlit", "colorFrom": "petrol", "sdk_version": 6.31, "hf_auth": True}
    del wrong["license"]
    said = " ".join(front_matter.problems(wrong))
    for part in (
        "no key 'license'",
        "sdk is 'streamlit'",
        "colorFrom is 'petrol'",
        "6.31, which is no str",
        "'hf_auth'",
    ):
        assert part in said
    with pytest.raises(ValueError, match="does not begin"):
        front_matter.parse("# lowmem\n")


@pytest.mark.parametrize("target", TARGETS)
def test_requirements_are_the_checkouts_but_for_what_the_space_brings(target: str) -> None:
    ours = {one.name for one in clean_venv.parse((ROOT / "requirements.txt").read_text().splitlines())}
    theirs = [one.name for one in clean_venv.parse(requirements(target))]
    assert len(theirs) == len(set(theirs))
    assert set(theirs) - {"spaces"} == ours - {"gradio"}


def test_the_requirements_can_be_met_together() -> None:
    """pip's own resolver, over what is installed: nothing is fetched."""
    lines = [line for line in requirements("cpu-basic") if not line.startswith("-")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-index", *lines]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_zerogpus_torch_is_taken_by_everything_beside_it() -> None:
    """This machine's may be a newer one; the packages that are installed say which they take."""
    own = [one for one in clean_venv.parse(requirements("zerogpu")) if one.name not in ("spaces", "torch")]
    beside = clean_venv.closure([*own, Requirement("gradio")])
    asked = [Requirement(text) for one in beside.values() for text in one.requires or ()]
    on_torch = [one.specifier for one in asked if one.name == "torch" and "extra" not in str(one.marker)]
    assert on_torch
    assert all(specifier.contains(max(ZEROGPU_TORCHES, key=Version)) for specifier in on_torch)


def test_a_folder_that_is_not_empty_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("x")
    assert main(["cpu-basic", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


# --- the assembled folder, started


@contextmanager
def started(folder: Path, python: Path, home: Path, **variables: str) -> Iterator[str]:
    """`python app.py` as a Space starts it, in a process that sees the folder and its own packages only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS", "TMPDIR") if name in os.environ}
    own = {"SYSTEM": "spaces", "MEMORY": "16Gi", "HF_HUB_OFFLINE": "1", "LOWMEM_HOME": str(home)}
    address = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": port}
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(
        [python, "app.py"], cwd=folder, env=kept | own | address | variables, stdout=log, stderr=log
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while not own_process.answers(url):
            assert process.poll() is None, (folder / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)
        log.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A mounted bucket with one model in it."""
    home = tmp_path / "bucket"
    toys.save_toy("llama", home / "models" / "toy")
    return home


def test_a_space_of_two_cores_starts_from_its_folder_alone(tmp_path: Path, home: Path) -> None:
    folder = build("cpu-basic", tmp_path / "space")
    lines = [*(folder / "requirements.txt").read_text().splitlines(), "gradio"]
    python = clean_venv.make(tmp_path / "venv", lines)
    code = "import lowmem, sys; print(lowmem.__file__, *sys.path)"
    seen = subprocess.run([python, "-c", code], cwd=folder, env={}, capture_output=True, text=True).stdout
    assert seen.startswith(str(folder))
    assert str(ROOT) not in seen
    toy = str(home / "models" / "toy")
    with started(folder, python, home) as url:
        client = Client(url, verbose=False)
        machine = client.predict(api_name="/machine")
        assert machine["hardware"]["host"] == "space"
        assert machine["hardware"]["cpu"]["total_bytes"] <= 16 * 2**30
        client.predict(toy, "fp32", 256, api_name="/load")
        answer = client.predict("Hello", {"max_new_tokens": 4, "unbounded": True}, api_name="/generate")
        assert answer["new_tokens"] == 4
        with pytest.raises(Exception, match="reserved for the owner"):
            client.predict(toy, "fp32", 256, "auto", "same", "", "", True, api_name="/load")


def zerogpu_venv(folder: Path, where: Path) -> Path:
    """Its requirements, but for what is not here: `spaces` has a double, and this machine's torch may be a newer one."""
    lines = (folder / "requirements.txt").read_text().splitlines()
    return clean_venv.make(where, [*(line for line in lines if not line.startswith(("spaces", "torch"))), "gradio"])


def test_a_zerogpu_space_answers_from_its_worker(tmp_path: Path, home: Path) -> None:
    folder = build("zerogpu", tmp_path / "space")
    python = zerogpu_venv(folder, tmp_path / "venv")
    toy, asked = str(home / "models" / "toy"), tmp_path / "seconds"
    options = {"max_new_tokens": 4, "unbounded": True}
    with started(
        folder, python, home, SPACES_ZERO_GPU="true", ZEROGPU_LOG=str(asked), PYTHONPATH=str(FAKE_SPACES)
    ) as url:
        client = Client(url, verbose=False)
        (card,) = client.predict(api_name="/machine")["hardware"]["gpus"]
        assert card["total_bytes"] == 48_000_000_000
        pretend = next(one["props"] for one in client.config["components"] if one["props"].get("elem_id") == "pretend")
        assert [size for _, size in pretend["choices"]] == [4, 6, 8, 12, 16, 0]
        assert pretend["value"] == 6
        loaded = client.predict(toy, "fp16", 256, "cuda:0", "same", "", "4G", api_name="/load")["receipt"]
        assert loaded["measured"] == {}  # nothing is on the GPU yet
        first = client.predict("Hello", options, api_name="/generate")["receipt"]
        assert first["measured"]["ram"] > 0  # read where the model ran
        assert first["details"]["loading_seconds"] > 0
        again = client.predict("Hello", options, api_name="/generate")["receipt"]
        assert again["details"]["loading_seconds"] < first["details"]["loading_seconds"] / 2  # the worker kept it
        assert all(10 <= int(seconds) <= 110 for seconds in asked.read_text().split())
        rows = client.predict(["a", "b"], options, api_name="/batch")["results"]
        assert [row["new_tokens"] for row in rows] == [4, 4]
        with pytest.raises(Exception, match="nothing to send"):
            client.predict("", options, api_name="/generate")
        with pytest.raises(Exception, match="context"):
            client.predict("x" * 5000, options, api_name="/generate")
        measured = client.predict("Hello " * 50, 32, 16, api_name="/perplexity")["receipt"]
        assert measured["details"]["perplexity"] > 1
        job = client.submit("Hello", options | {"max_new_tokens": 400}, api_name="/generate")
        next(iter(job))
        job.cancel()
        assert client.predict("Hello", options, api_name="/generate")["new_tokens"] == 4


def test_seconds_grow_with_the_model_and_the_answer_and_end_below_a_visitors_day(tmp_path: Path) -> None:
    code = """
import lowmem
from lowmem.machine.gpu import ZEROGPU
from lowmem.models.catalog import find
from lowmem.runtime.session import Session
from lowmem.runtime.worker import Call
from lowmem.runtime.zerogpu import estimated_seconds
from dataclasses import replace
hardware = replace(lowmem.probe(), gpus=(ZEROGPU,))
for ref in ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"):
    plan = lowmem.plan(find(ref).spec(), hardware, lowmem.MemoryBudget.detect(hardware), lowmem.Goal(device="cuda:0"))
    for tokens in (64, 1024, 100000):
        options = lowmem.GenerateOptions(max_new_tokens=tokens)
        print(estimated_seconds(plan, Call(Session.generate, ("Hello", options))))
"""
    paths = os.pathsep.join((str(ROOT), str(FAKE_SPACES)))
    env = os.environ | {"PYTHONPATH": paths, "LOWMEM_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    small, more, most, large, larger, largest = map(int, done.stdout.split())
    assert small < more < most
    assert small < large < larger
    assert most == largest == 110


def test_a_visitor_without_seconds_left_is_told(tmp_path: Path, home: Path) -> None:
    folder = build("zerogpu", tmp_path / "space")
    toy = str(home / "models" / "toy")
    python = zerogpu_venv(folder, tmp_path / "venv")
    variables = {"SPACES_ZERO_GPU": "true", "ZEROGPU_QUOTA": "0", "PYTHONPATH": str(FAKE_SPACES)}
    with started(folder, python, home, **variables) as url:
        client = Client(url, verbose=False)
        client.predict(toy, "fp16", 256, "cuda:0", api_name="/load")
        with pytest.raises(Exception, match="ZeroGPU quota exceeded: You have exceeded your quota"):
            client.predict("Hello", api_name="/generate")


def test_the_package_carries_every_file_that_it_reads() -> None:
    """Where it is installed and not checked out, as on Colab."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lowmem"]
    package = ROOT / "lowmem"
    carried = {file for pattern in told for file in package.glob(pattern)}
    read = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert read == carried
