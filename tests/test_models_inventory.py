"""What is kept on the disk is listed by size and deleted at once; nothing else ever is."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys
from ui_stub import StubEngine

from lowmem.errors import BadInput, LowMemError, NotAllowed
from lowmem.events import CancelToken
from lowmem.models.inventory import stored_folders
from lowmem.ui.service.access import Access
from lowmem.ui.service.engine import Choice


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path))
    for name, size in (("models/demo", 10), ("outputs/made", 3000), ("graphs/demo-0a", 200), ("models/.work", 9)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(bytes(size))
    (tmp_path / "outputs" / "half.part").mkdir()
    (tmp_path / "keep").mkdir()
    return tmp_path


def test_the_largest_comes_first_and_work_in_progress_never(home: Path) -> None:
    assert [(one.key, one.kind, one.nbytes) for one in stored_folders()] == [
        ("outputs/made", "made here", 3000),
        ("graphs/demo-0a", "graph", 200),
        ("models/demo", "fetched", 10),
    ]


def test_what_is_deleted_is_gone_and_its_bytes_are_told(home: Path) -> None:
    assert StubEngine().delete("outputs/made") == 3000
    assert not (home / "outputs/made").exists()
    assert [one.key for one in stored_folders()] == ["graphs/demo-0a", "models/demo"]
    assert not [left for left in (home / "outputs").iterdir() if "deleted" in left.name]


@pytest.mark.parametrize("key", ["", "keep", "models/../keep", "models/.work", "/etc", "models", "outputs/half.part"])
def test_nothing_else_is_ever_deleted(key: str, home: Path) -> None:
    before = sorted(home.rglob("*"))
    with pytest.raises(BadInput, match="Nothing is stored here as"):
        StubEngine().delete(key)
    assert sorted(home.rglob("*")) == before


def test_a_link_is_not_followed(home: Path) -> None:
    (home / "outputs/elsewhere").symlink_to(home / "keep")
    with pytest.raises(BadInput):
        StubEngine().delete("outputs/elsewhere")


def test_visitors_delete_nothing(home: Path) -> None:
    with pytest.raises(NotAllowed, match="Deleting from this machine is reserved for the owner"):
        StubEngine(access=Access(public=True)).delete("models/demo")
    assert (home / "models/demo").is_dir()


def test_the_resident_model_stays(home: Path) -> None:
    toys.save_toy("llama", home / "outputs/toy")
    engine = StubEngine()
    plan = engine.plan(Choice(model=str(home / "outputs/toy")))
    list(engine.load(plan, CancelToken()))
    with pytest.raises(LowMemError, match="toy is loaded"):
        engine.delete("outputs/toy")
    engine.unload()
    assert engine.delete("outputs/toy") > 0
