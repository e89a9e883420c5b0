"""Texts behind an address, from a server on this machine: what is read, and one sentence for each that is not."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from lowmem.datasets import long_text as sources
from lowmem.datasets.long_text import fetch_text, html_to_text, long_text
from lowmem.errors import BadInput, Cancelled, LowMemError, Offline
from lowmem.events import CancelToken

PAGE = "<html><head><title>x</title></head><script>bad()</script><p>Caf&eacute;</p><p>au<b>l</b>ait</p>"
ANSWERS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "/text": (200, {"Content-Type": "text/plain; charset=latin-1"}, "Café".encode("latin-1")),
    "/page": (200, {"Content-Type": "text/html"}, PAGE.encode()),
    "/moved": (302, {"Location": "/text"}, b""),
    "/pdf": (200, {"Content-Type": "application/pdf"}, b"%PDF"),
    "/binary": (200, {"Content-Type": "text/plain"}, b"a\0b"),
    "/empty": (200, {"Content-Type": "text/plain"}, b" \n"),
    "/declared": (200, {"Content-Type": "text/plain", "Content-Length": "5000000"}, b""),
    "/huge": (200, {"Content-Type": "text/plain"}, b"a" * 5_000_000),
    "/packed": (200, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(b"a" * 1000)),
    "/missing": (404, {}, b""),
    "/again": (302, {"Location": "/again"}, b""),
    "/inside": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""),
    "/elsewhere": (302, {"Location": "file:///etc/passwd"}, b""),
    "/nowhere": (302, {"Location": "http://[::1/"}, b""),
}


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        with suppress(OSError):  # whoever asked has heard enough
            self._drip() if self.path == "/drip" else self._answer(*ANSWERS[self.path])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _drip(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.1)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


@pytest.fixture
def public(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server, as if it stood in the public network; nothing else on this machine does."""
    monkeypatch.setattr(sources, "is_public", lambda ip: ip == "127.0.0.1")
    Handler.asked.clear()
    return server


@pytest.mark.parametrize(("path", "text"), [("/text", "Café"), ("/page", "Café\n\naulait"), ("/moved", "Café")])
def test_texts_and_pages_are_read_as_people_see_them(path: str, text: str, public: str) -> None:
    found = long_text("pasted", None, public + path)
    assert (found.name, found.text) == ("127.0.0.1", text)
    assert html_to_text(PAGE) == "Café\n\naulait"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/pdf", "The URL returned application/pdf, not text."),
        ("/binary", "The text contains binary data."),
        ("/empty", "The text is empty."),
        ("/declared", "The text is larger than the 4.00 MB allowed."),
        ("/huge", "The text is larger than the 4.00 MB allowed."),
        ("/packed", "127.0.0.1 sent compressed data, not plain text."),
        ("/missing", "/missing returned status 404."),
        ("/again", "127.0.0.1 redirects more than 4 times."),
        ("/inside", "169.254.169.254 is not on the public network."),
        ("/elsewhere", "'file:///etc/passwd' is not the URL of a text."),
    ],
)
def test_what_is_not_a_text_is_refused_in_one_sentence(path: str, message: str, public: str) -> None:
    with pytest.raises(BadInput) as caught:
        long_text(source=public + path)
    assert caught.value.message.endswith(message)
    assert caught.value.hint


def test_an_answer_that_drips_is_given_up(public: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(Offline, match=r"127\.0\.0\.1 did not send the whole text within 0 s"):
        fetch_text(f"{public}/drip", CancelToken())
    assert time.monotonic() - started < 3


def test_stop_does_not_wait_for_the_network(public: str) -> None:
    cancel = CancelToken()
    threading.Timer(0.3, cancel.set).start()
    with pytest.raises(Cancelled):
        fetch_text(f"{public}/drip", cancel)


def test_nobody_there_is_said(public: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(Offline, match=r"127\.0\.0\.1 cannot be reached: .*refused"):
        fetch_text(f"http://127.0.0.1:{port}/", CancelToken())
    with pytest.raises(Offline, match="cannot be reached: Invalid URL in location header"):
        fetch_text(f"{public}/nowhere", CancelToken())
    with pytest.raises(Offline, match=r"nowhere\.invalid cannot be found"):
        fetch_text("http://nowhere.invalid/", CancelToken())


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "0.0.0.0", "0177.0.0.1", "[::ffff:10.0.0.1]",
     "192.168.1.1", "172.16.0.1", "100.64.0.1", "224.0.0.1", "[fe80::1]", "[fd00::1]"],
)  # fmt: skip
def test_the_servers_own_network_is_not_looked_into(host: str) -> None:
    with pytest.raises(LowMemError, match="is not on the public network"):
        fetch_text(f"http://{host}/", CancelToken())


def test_a_name_that_leads_inside_the_second_time_is_not_sent_a_byte(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Handler.asked.clear()
    look_up, told = socket.getaddrinfo, [("93.184.216.34", 80)]

    def rebinding(host: str, *args: Any, **kwargs: Any) -> Any:
        if host == "localhost" and told:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", told.pop())]
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with pytest.raises(BadInput, match=r"127\.0\.0\.1 is not on the public network"):
        fetch_text(f"{server.replace('127.0.0.1', 'localhost')}/text", CancelToken())
    assert not told
    assert not Handler.asked


@pytest.mark.parametrize("address", ["/etc/passwd", "file:///etc/passwd", "ftp://example.org/x", "http://a:b:c/"])
def test_paths_are_no_addresses(address: str) -> None:
    with pytest.raises(BadInput, match="is not the URL of a text"):
        long_text(source=address)
