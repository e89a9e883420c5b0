"""A long text from wherever a person has it: pasted, a file, an address, or one that is here; always bounded."""

from __future__ import annotations

import html
import ipaddress
import re
import socket
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx

from lowmem.errors import BadInput, Offline
from lowmem.events import CancelToken
from lowmem.measure.texts import NAMES, Text, tail
from lowmem.models.background import interruptible
from lowmem.units import MB, format_bytes

MOST_CHARACTERS = 2_000_000
MOST_BYTES = 4 * MB
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
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
    """The text behind an http or https address on the public network; of a page, what a reader sees."""
    for _ in range(MOST_REDIRECTS + 1):
        _check_public(address)
        try:
            with httpx.Client(timeout=TIMEOUT) as client, client.stream("GET", address) as answer:
                if answer.is_redirect:
                    address = urljoin(address, answer.headers.get("location", ""))
                    continue
                if answer.status_code != 200:
                    raise BadInput(f"{address} answers with status {answer.status_code}.", "Check the address.")
                return Text(urlsplit(address).netloc, _readable(_body(answer, cancel), answer.headers))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Offline(
                f"{address[:100]} cannot be reached: {error}.", "Check the address, or paste the text."
            ) from error
    raise BadInput(f"{address[:100]} redirects more than {MOST_REDIRECTS} times.", "Give the final address.")


def _check_public(address: str) -> None:
    """Nobody shall use this page to look into the network that its server stands in."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{address[:100]!r} is no address of a text.", "Write it like https://www.gutenberg.org/...")
    try:
        found = socket.getaddrinfo(parts.hostname, None)
    except (OSError, UnicodeError):
        raise Offline(f"{parts.hostname[:100]} cannot be found.", "Check the address, or paste the text.") from None
    if not all(ipaddress.ip_address(entry[4][0]).is_global for entry in found):
        raise BadInput(f"{parts.hostname[:100]} is not on the public network.", "Paste the text instead.")


def _body(answer: httpx.Response, cancel: CancelToken) -> bytes:
    data = bytearray()
    for part in interruptible(answer.iter_bytes(), cancel):
        data += part
        if len(data) > MOST_BYTES:
            raise BadInput(f"The text is larger than the {format_bytes(MOST_BYTES)} allowed.", "Give a part of it.")
    return bytes(data)


def _readable(data: bytes, headers: httpx.Headers) -> str:
    kind = headers.get("content-type", "text/plain").lower()
    if b"\0" in data or not kind.startswith("text/"):
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
