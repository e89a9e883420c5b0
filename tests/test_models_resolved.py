"""A graph is cached under the content of the model it was made from: written once, wherever the model came from."""

from __future__ import annotations

import shutil
from pathlib import Path

import fake_hub
import pytest
import toys

from lowmem.events import Step
from lowmem.machine.budget import MemoryBudget
from lowmem.models.inventory import stored_folders
from lowmem.models.source import local_folder, read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.runtime.session import Session
from lowmem.settings import settings

REPO = "acme/toy"


def planned(ref: str) -> Plan:
    hardware = Session().hardware()
    return plan(
        read_spec(ref), hardware, MemoryBudget.detect(hardware), Goal(context=64, precision="fp32", backend="onnx")
    )


def writes_a_graph(made: Plan) -> bool:
    session = Session()
    steps = list(session.load(made))
    assert session.plan is not None
    assert session.plan.spec.source.folder is not None
    session.unload()
    return any(isinstance(step, Step) and "graph, once" in step.note for step in steps)


def graphs() -> list[str]:
    return [path.name for path in (settings().home / "graphs").iterdir() if not path.name.startswith(".")]


@pytest.mark.usefixtures("online")
def test_a_graph_is_written_once_before_and_after_the_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.save_toy("llama", tmp_path / "toy")
    with fake_hub.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add(REPO, {file.name: file.read_bytes() for file in toy.iterdir()})
        before = planned(REPO)
        assert writes_a_graph(before)
        after = planned(REPO)
        assert (after.spec.source, after.spec.name) == (before.spec.source, "toy")
        assert not writes_a_graph(after)
        folder = local_folder(REPO)
        assert folder is not None
        shutil.copytree(folder, settings().outputs / "another name")  # keeps the times of the files
        assert not writes_a_graph(planned(str(settings().outputs / "another name")))
        assert len(graphs()) == 1
        assert [one.name for one in stored_folders() if one.kind == "graph"] == ["toy"]
