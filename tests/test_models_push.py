"""Pushing a folder: what the hub is sent, and what is said when it will not have it. The hub is on localhost."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import BadInput, GatedModel, Offline
from lowmem.models.push import push

TOKEN = "hf_typed_for_this_once"


class Hub:
    """Takes repositories and commits; `status` is what it answers to everything when it is not 200."""

    def __init__(self) -> None:
        self.status, self.created, self.files = 200, [], {}  # type: ignore[var-annotated]
        self.tokens: set[str | None] = set()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, online: None) -> Iterator[Hub]:
    told = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            told.tokens.add(self.headers.get("Authorization"))
            self._answer(told.status, _reply(told, self.path, body) if told.status == 200 else {"error": "no"})

        def do_GET(self) -> None:
            self._answer(told.status, {"id": "ada/made", "sha": "0" * 40, "siblings": []})

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield told
    server.shutdown()
    server.server_close()


def _reply(told: Hub, path: str, body: bytes) -> dict[str, Any]:
    if path.endswith("/repos/create"):
        told.created.append(json.loads(body))
        return {"url": "http://127.0.0.1/ada/made", "name": "made"}
    if "/preupload/" in path:
        wanted = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
    if "/commit/" in path:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                told.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": "http://127.0.0.1/ada/made/commit/0", "commitOid": "0" * 40}
    return {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    for name in ("config.json", "README.md", "model.safetensors", "journal.json", "lock"):
        (made / name).write_text("{}")
    return made


def test_a_folder_is_uploaded_with_the_token_that_was_typed(
    hub: Hub, folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    address = push(folder, "ada/made", TOKEN, private=True)
    assert address.endswith("/ada/made")
    assert "private" in str(hub.created[0])
    assert set(hub.files) == {"config.json", "README.md", "model.safetensors"}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert kept == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_may_not_write_is_said_without_showing_it(hub: Hub, folder: Path, status: int) -> None:
    hub.status = status
    with pytest.raises(GatedModel, match="This token has no write access to ada/made") as caught:
        push(folder, "ada/made", TOKEN)
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(("repo", "token", "said"), [
    ("ada/made", " ", "token is needed"),
    ("made", TOKEN, "'made' is not the name"),
    ("../../etc/x", TOKEN, "is not the name"),
])  # fmt: skip
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(
    hub: Hub, folder: Path, repo: str, token: str, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        push(folder, repo, token)
    assert hub.tokens == set()


def test_offline_is_said(folder: Path) -> None:
    with pytest.raises(Offline, match="HF_HUB_OFFLINE"):
        push(folder, "ada/made", TOKEN)
    with pytest.raises(BadInput, match="not a model folder"):
        push(folder.parent, "ada/made", TOKEN)


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_reached_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Offline, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        push(folder, "ada/made", TOKEN)
