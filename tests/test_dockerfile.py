"""The Dockerfile, read: there is no docker where the tests run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, rest in lines]


def argument(steps: list[tuple[str, str]], word: str) -> str:
    (found,) = [rest for key, rest in steps if key == word]
    return found


def test_it_runs_as_nobody_special_from_a_slim_python(steps: list[tuple[str, str]]) -> None:
    assert re.fullmatch(r"python:3\.1[1-3]-slim", argument(steps, "FROM"))
    words = [word for word, _ in steps]
    assert argument(steps, "USER") == "1000"
    assert words.index("USER") < words.index("COPY") < words.index("ENTRYPOINT")


def test_everything_that_is_copied_exists_and_is_let_in(steps: list[tuple[str, str]]) -> None:
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [name for word, rest in steps if word == "COPY" for name in rest.split()[1:-1]]
    assert sorted(copied) == sorted(let_in)
    assert all((ROOT / name).exists() for name in copied)


def test_torch_is_the_build_for_cpus(steps: list[tuple[str, str]]) -> None:
    installs = [rest for word, rest in steps if word == "RUN" and "pip install" in rest]
    assert all("download.pytorch.org/whl/cpu" in install for install in installs)
    assert len(installs) == 1


def test_models_stay_in_a_volume(steps: list[tuple[str, str]]) -> None:
    volume = argument(steps, "VOLUME")
    assert f"LOWMEM_HOME={volume}" in argument(steps, "ENV")
    made = next(rest for word, rest in steps if word == "RUN" and "useradd" in rest)
    assert volume in made  # a volume takes over the owner of the folder that is there


def test_it_listens_and_is_asked_whether_it_lives(steps: list[tuple[str, str]]) -> None:
    entry = json.loads(argument(steps, "ENTRYPOINT"))
    port = argument(steps, "EXPOSE")
    assert entry[:2] == ["python", "app.py"]
    assert entry[entry.index("--port") + 1] == port
    assert entry[entry.index("--host") + 1] == "0.0.0.0"
    check = argument(steps, "HEALTHCHECK")
    probe = json.loads(check[check.index("[") :])
    assert f"127.0.0.1:{port}" in probe[-1]
    compile(probe[-1], "HEALTHCHECK", "exec")
