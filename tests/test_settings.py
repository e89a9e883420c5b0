"""The environment, as settings read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.settings import settings


def test_home_and_its_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWMEM_HOME", str(tmp_path / "here"))
    assert settings().home == tmp_path / "here"
    assert settings().models == tmp_path / "here" / "models"
    assert settings().outputs == tmp_path / "here" / "outputs"
    monkeypatch.delenv("LOWMEM_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert settings().home == tmp_path / "lowmem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert settings().home == Path.home().resolve() / ".cache" / "lowmem"


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, "local"),
        ({"COLAB_RELEASE_TAG": "release-colab"}, "colab"),
        ({"SYSTEM": "spaces"}, "space"),
        ({"SPACE_ID": "me/lowmem"}, "space"),
        ({"SYSTEM": "spaces", "SPACES_ZERO_GPU": "true"}, "zerogpu"),
        ({"SYSTEM": "spaces", "SPACES_ZERO_GPU": "1"}, "zerogpu"),
        ({"SYSTEM": "spaces", "SPACES_ZERO_GPU": "false"}, "space"),
    ],
)
def test_host(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], host: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings().host == host


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("ON", True), ("true", True), ("0", False), ("", False)])
def test_hub_offline(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert settings().hub_offline is offline


def test_hub_endpoint_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (settings().hub_endpoint, settings().hub_token) == ("https://huggingface.co", None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert settings().hub_endpoint == "http://127.0.0.1:9"
    assert settings().hub_token == "hf_secret"
    assert "hf_secret" not in repr(settings())


def test_visible_gpus_tell_none_from_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings().visible_gpus is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert settings().visible_gpus == ""
