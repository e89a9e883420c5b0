"""A long text from wherever a person has it: pasted, a file, an address, or one that is here; always bounded."""

from __future__ import annotations

import html
import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from lowmem.background import interruptible
from lowmem.datasets.texts import NAMES, Text, tail
from lowmem.errors import BadInput, Offline
from lowmem.events import CancelToken
from lowmem.units import MB, format_bytes

MOST_CHARACTERS = 2_000_000
MOST_BYTES = 4 * MB
MOST_SECONDS = 30.0
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
HEADERS = {"User-Agent": "lowmem", "Accept": "text/*", "Accept-Encoding": "identity"}
MOST_REDIRECTS = 4

_HIDDEN = re.compile(r"<(script|style|head|noscript)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCKS = re.compile(r"</?(p|div|br|li|h[1-6]|tr|section|article)\b[^>]*>", re.IGNORECASE)
_TAGS = re.compile(r"<[^>]+>")


def long_text(
    pasted: str = "", file: str | Path | None = None, source: str = "", cancel: CancelToken | None = None
) -> Text:
    """The first of these that is given: a file, an address (https://...) or a name in `source`, a pasted text.

    Raises:
        BadInput: nothing is given, or what is given is empty, binary, too large, or not on the public network.
        Offline: the address, or a named text, cannot be reached.
    """
    if file:
        text = tail(Path(file), cancel)
    elif source in NAMES:
        text = tail(source, cancel)
    elif source.strip():
        text = fetched(source.strip(), cancel or CancelToken())
    else:
        text = Text("pasted", pasted)
    if not text.text.strip():
        raise BadInput("The text is empty.", "Paste a text, choose a file, or give an address.")
    if len(text.text) > MOST_CHARACTERS:
        raise BadInput(
            f"The text has {len(text.text):,} characters, more than the {MOST_CHARACTERS:,} that are accepted.",
            "Give a part of it.",
        )
    if "\0" in text.text:
        raise BadInput("The text holds binary data.", "Give plain text.")
    return text


def fetched(address: str, cancel: CancelToken) -> Text:
    """The text behind an http or https address on the public network; of a page, what a reader sees.

    Bounded in bytes, redirects and seconds, however slowly the answer drips.
    """
    # A transport of its own: with a proxy in between, nobody would see who is being talked to.
    with httpx.Client(timeout=TIMEOUT, headers=HEADERS, transport=httpx.HTTPTransport()) as client:
        try:
            for text in interruptible(_arriving(client, address), cancel, MOST_SECONDS):
                if text is not None:
                    return text
        except TimeoutError:
            raise Offline(
                f"{_host(address)} has not sent the whole text within {MOST_SECONDS:.0f} s.",
                "Try again, or paste the text.",
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise Offline(
                f"{_host(address)} cannot be reached: {why}.", "Check the address, or paste the text."
            ) from None
    raise BadInput(f"{_host(address)} redirects more than {MOST_REDIRECTS} times.", "Give the final address.")


def _arriving(client: httpx.Client, address: str) -> Iterator[Text | None]:
    """None for every part that has come, the text at the end; nothing when there are too many redirects."""
    for _ in range(MOST_REDIRECTS + 1):
        _check_public(address)
        with client.stream("GET", address, extensions={"trace": _check_peer}) as answer:
            if answer.is_redirect:
                address = urljoin(address, answer.headers.get("location", ""))
                continue
            _check_answer(address, answer)
            data = bytearray()
            for part in answer.iter_raw():
                data += part
                if len(data) > MOST_BYTES:
                    raise _too_large()
                yield None
            yield Text(_host(address), _readable(bytes(data), answer.headers))
            return


def _check_public(address: str) -> None:
    """Nobody shall use this page to look into the network that its server stands in."""
    try:
        parts = urlsplit(address)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = None
    if scheme not in ("http", "https") or not host:
        raise BadInput(f"{address[:100]!r} is no address of a text.", "Write it like https://www.gutenberg.org/...")
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise Offline(f"{host[:100]} cannot be found.", "Check the address, or paste the text.") from None
    if not all(_is_public(str(entry[4][0])) for entry in found):
        raise _not_public(host)


def _check_peer(event: str, info: Mapping[str, Any]) -> None:
    """The same of the machine that was connected to, before a byte is sent: names may lead elsewhere the second time."""
    if event == "connection.connect_tcp.complete":
        peer = str(info["return_value"].get_extra_info("server_addr")[0])
        if not _is_public(peer):
            raise _not_public(peer)


def _is_public(ip: str) -> bool:
    found = ipaddress.ip_address(ip)
    return found.is_global and not found.is_multicast


def _check_answer(address: str, answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise BadInput(f"{address[:100]} answers with status {answer.status_code}.", "Check the address.")
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        # A megabyte may unfold to a thousand.
        raise BadInput(f"{_host(address)} sends compressed data, not plain text.", "Paste the text instead.")
    if int(answer.headers.get("content-length", 0)) > MOST_BYTES:
        raise _too_large()


def _not_public(host: str) -> BadInput:
    return BadInput(f"{host[:100]} is not on the public network.", "Paste the text instead.")


def _too_large() -> BadInput:
    return BadInput(f"The text is larger than the {format_bytes(MOST_BYTES)} allowed.", "Give a part of it.")


def _host(address: str) -> str:
    """What to call an address that has been looked at: without a password, and not too long."""
    return (urlsplit(address).hostname or address)[:100]


def _readable(data: bytes, headers: httpx.Headers) -> str:
    kind = headers.get("content-type", "text/plain").lower()
    if not kind.startswith("text/"):
        raise BadInput(f"The address gives {kind.split(';')[0]}, not text.", "Give the address of a text or a page.")
    charset = re.search(r"charset=([\w-]+)", kind)
    try:
        text = data.decode(charset[1] if charset else "utf-8", "replace")
    except LookupError:
        text = data.decode("utf-8", "replace")
    return plain(text) if "html" in kind else text


def plain(page: str) -> str:
    """An HTML page without its marks."""
    text = _TAGS.sub("", _BLOCKS.sub("\n", _HIDDEN.sub("", page)))
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(text)).strip()
