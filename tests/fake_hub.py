"""A hub on localhost that serves repositories from memory, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeRepository:
    """Files by name, and how this repository refuses."""

    files: dict[str, bytes]
    gated: bool = False
    wrong_hash: str = ""
    licence: str = "apache-2.0"

    def description(self) -> dict[str, object]:
        siblings = [self._sibling(name, data) for name, data in self.files.items()]
        return {
            "sha": COMMIT,
            "siblings": siblings,
            "gated": "manual" if self.gated else False,
            "cardData": {"license": self.licence},
        }

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        if not name.endswith((".safetensors", ".gguf")):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            return {"rfilename": name, "size": len(data), "blobId": "0" * 40 if name == self.wrong_hash else blob}
        digest = "0" * 64 if name == self.wrong_hash else hashlib.sha256(data).hexdigest()
        return {"rfilename": name, "size": len(data), "blobId": "f" * 40, "lfs": {"sha256": digest, "size": len(data)}}


@dataclass
class FakeHub:
    """What is served, what was asked, and the misbehaviour in force.

    Args:
        cut_after: hang up after so many bytes of a weight file, this many times (`cuts`).
        resumes: honour Range requests.
        stall_seconds: pause in the middle of every weight file.
        token: what a gated repository wants.
    """

    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    endpoint: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    cut_after: int = 0
    cuts: int = 0
    resumes: bool = True
    stall_seconds: float = 0
    token: str = "secret"

    def add(self, repo: str, files: dict[str, bytes], **about: object) -> FakeRepository:
        self.repositories[repo] = FakeRepository(files, **about)  # type: ignore[arg-type]
        return self.repositories[repo]

    def ranges(self, name: str) -> list[str]:
        """The Range headers with which a file was asked for; "" for all of it."""
        return [wanted for path, wanted in self.requests if path.endswith(f"/{name}")]


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a hub until the block ends; its `endpoint` is what HF_ENDPOINT should be."""
    hub = FakeHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((path, self.headers.get("Range", "")))
        if match := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                return self._refuse(401, "RepoNotFound")
            if match[2] not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            return self._send(json.dumps(repository.description()).encode())
        match = re.fullmatch(rf"/(.+)/resolve/{COMMIT}/(.+)", path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if not match or repository is None or match[2] not in repository.files:
            return self._refuse(404, "EntryNotFound")
        if repository.gated and (status := self._gate()):
            return self._refuse(status, "GatedRepo")
        return self._send_file(match[2], repository.files[match[2]])

    def _gate(self) -> int:
        given = self.headers.get("Authorization")
        return 401 if given is None else 0 if given == f"Bearer {self.hub.token}" else 403

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_file(self, name: str, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.resumes else None
        body = data[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None] if wanted else data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        download = name.endswith(".safetensors") and not (wanted and wanted[2])
        if download and self.hub.cuts:
            self.hub.cuts -= 1
            body = body[: self.hub.cut_after]
            self.close_connection = True
        try:
            half = len(body) // 2 if download and self.hub.stall_seconds else len(body)
            self.wfile.write(body[:half])
            if half < len(body):
                time.sleep(self.hub.stall_seconds)
                self.wfile.write(body[half:])
            self.hub.sent[name] = self.hub.sent.get(name, 0) + len(body)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
