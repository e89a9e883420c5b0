"""A sweep on a local Ray cluster of two machines, of which one dies in the middle. Skipped where Ray is not installed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys

from lowmem.errors import BadInput, MissingDependency
from lowmem.events import Receipt, Step
from lowmem.measure.rows import Row
from lowmem.settings import settings
from lowmem.sweep.grid import make_grid
from lowmem.sweep.run import sweep
from lowmem.units import MB

MEASURE = {"tokens": 200, "window": 64, "stride": 32, "prompt_tokens": 32, "new_tokens": 4, "runs": 1}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two workers of one core each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    pytest.importorskip("ray", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 200 * MB, "memory": 4000 * MB}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small}, connect=False)
    cluster.workers = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def workspaces() -> set[str]:
    """Folders of cells whose worker is alive."""
    found = (settings().home / "work").glob("compare-*-*")
    return {folder.name for folder in found if psutil.pid_exists(int(folder.name.split("-")[1]))}


def test_one_of_two_workers_dies_in_the_middle_and_nothing_is_lost(cluster, tmp_path):
    folder = str(toys.save_toy("llama", tmp_path / "toy"))
    methods = {"rtn": {"bits": [2, 3, 4, 8], "group_size": 32}, "hqq": {"bits": [3, 4], "group_size": 32}}
    grid = make_grid({"models": [folder], "precisions": ["int8"], "methods": methods, "measure": MEASURE})
    names = [cell.variant.name for cell in grid.cells()]
    seen: set[str] = set()
    killed: list[int] = []

    def kill_one_at_work() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            alive = workspaces()
            seen.update(alive)
            if not killed and len(alive) == 2 and len(seen) >= 3:
                killed.append(len(rows))
                cluster.remove_node(cluster.workers[0], allow_graceful=False)
            time.sleep(0.05)

    rows: list[Row] = []
    threading.Thread(target=kill_one_at_work, daemon=True).start()
    receipt = None
    for event in sweep(grid, tmp_path / "out", ray=cluster.address):
        if isinstance(event, Row):
            rows.append(event)
        elif isinstance(event, Receipt):
            receipt = event
        else:
            assert isinstance(event, Step)
    assert killed, "no worker was killed"
    assert 0 < killed[0] < len(names) - 1
    assert len(seen) > len(names)  # a cell was begun twice
    assert sorted(row.variant for row in rows) == sorted(names)
    assert [row.error for row in rows] == [""] * len(names)
    assert all(row.kl is not None for row in rows)  # the reference's predictions reached every machine
    assert receipt is not None
    assert [row["variant"] for row in receipt.details["rows"]] == names
    assert not (tmp_path / "out" / "work").exists()


def test_an_address_without_a_cluster_is_one_sentence(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = str(toys.save_toy("llama", tmp_path / "toy"))
    grid = make_grid({"models": [folder], "precisions": ["fp32"], "measure": MEASURE})
    with pytest.raises(BadInput, match="No Ray cluster responds at auto"):
        list(sweep(grid, tmp_path / "out", ray="auto"))


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    folder = str(toys.save_toy("llama", tmp_path / "toy"))
    grid = make_grid({"models": [folder], "precisions": ["fp32"], "measure": MEASURE})
    with pytest.raises(MissingDependency, match="needs Ray") as caught:
        list(sweep(grid, tmp_path / "out", ray="auto"))
    assert "pip install" in caught.value.hint
