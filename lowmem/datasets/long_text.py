"""Reading a long text: pasted, from a file, from a URL, or one of the named texts; always bounded in size."""

from __future__ import annotations

import html
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx

from lowmem.background import interruptible
from lowmem.datasets.addresses import is_public
from lowmem.datasets.texts import NAMES, Text, evaluation_text
from lowmem.errors import BadInput, Offline
from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.units import MB, format_bytes

MAX_CHARACTERS = 2_000_000
MAX_BYTES = 4 * MB
MAX_SECONDS = 30.0
TIMEOUT = httpx.Timeout(10.0, connect=5.0)
HEADERS = {"User-Agent": "lowmem", "Accept": "text/*", "Accept-Encoding": "identity"}
MAX_REDIRECTS = 4

_HIDDEN = re.compile(r"<(script|style|head|noscript)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BLOCKS = re.compile(r"</?(p|div|br|li|h[1-6]|tr|section|article)\b[^>]*>", re.IGNORECASE)
_TAGS = re.compile(r"<[^>]+>")


def long_text(
    pasted: str = "", file: str | Path | None = None, source: str = "", cancel: CancelToken | None = None
) -> Text:
    """The text of `file`, else of `source`, else `pasted`.

    Args:
        source: a URL (https://...) or the name of a text, see `texts.NAMES`.

    Raises:
        BadInput: the text is missing, empty, binary or too large, or its URL is not on the public network.
        Offline: the URL or the hub cannot be reached.
    """
    if file:
        text = evaluation_text(Path(file), cancel)
    elif source in NAMES:
        text = evaluation_text(source, cancel)
    elif source.strip():
        text = fetch_text(source.strip(), cancel or CancelToken())
    else:
        text = Text("pasted", pasted)
    if not text.text.strip():
        raise BadInput(msg("The text is empty."), msg("Paste a text, choose a file, or enter a URL."))
    if len(text.text) > MAX_CHARACTERS:
        raise BadInput(
            msg(
                "The text has {text:,} characters, more than the {max_characters:,} allowed.",
                text=len(text.text),
                max_characters=MAX_CHARACTERS,
            ),
            msg("Use a part of it."),
        )
    if "\0" in text.text:
        raise BadInput(msg("The text contains binary data."), msg("Use plain text."))
    return text


def fetch_text(address: str, cancel: CancelToken) -> Text:
    """Download the text at an http or https URL on the public network; of an HTML page, its visible text.

    Bounded in bytes, redirects and seconds, even when the server sends very slowly.
    """
    # An explicit transport ignores proxies: behind one, the address that is connected to could not be checked.
    with httpx.Client(timeout=TIMEOUT, headers=HEADERS, transport=httpx.HTTPTransport()) as client:
        try:
            for text in interruptible(_download(client, address), cancel, MAX_SECONDS):
                if text is not None:
                    return text
        except TimeoutError:
            raise Offline(
                msg(
                    "{address} did not send the whole text within {max_seconds:.0f} s.",
                    address=_host(address),
                    max_seconds=MAX_SECONDS,
                ),
                msg("Try again, or paste the text."),
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error).rstrip(".") or type(error).__name__
            raise Offline(
                msg("{address} cannot be reached: {why}.", address=_host(address), why=why),
                msg("Check the URL, or paste the text."),
            ) from None
    raise BadInput(
        msg(
            "{address} redirects more than {max_redirects} times.", address=_host(address), max_redirects=MAX_REDIRECTS
        ),
        msg("Use the final URL."),
    )


def _download(client: httpx.Client, address: str) -> Iterator[Text | None]:
    """Yields None for each chunk received, then the text; ends without a text after too many redirects."""
    for _ in range(MAX_REDIRECTS + 1):
        _check_public(address)
        with client.stream("GET", address, extensions={"trace": _check_peer}) as answer:
            if answer.is_redirect:
                address = urljoin(address, answer.headers.get("location", ""))
                continue
            _check_answer(address, answer)
            data = bytearray()
            for part in answer.iter_raw():
                data += part
                if len(data) > MAX_BYTES:
                    raise _too_large()
                yield None
            yield Text(_host(address), _readable(bytes(data), answer.headers))
            return


def _check_public(address: str) -> None:
    """Refuse addresses of the server's own network, which visitors must not reach through it (SSRF)."""
    try:
        parts = urlsplit(address)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host = scheme = None
    if scheme not in ("http", "https") or not host:
        raise BadInput(
            msg("{address!r} is not the URL of a text.", address=address[:100]),
            msg("Write it like https://www.gutenberg.org/..."),
        )
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise Offline(
            msg("{host} cannot be found.", host=host[:100]), msg("Check the URL, or paste the text.")
        ) from None
    if not all(is_public(str(entry[4][0])) for entry in found):
        raise _not_public(host)


def _check_peer(event: str, info: Mapping[str, Any]) -> None:
    """Check the connected peer too, before a byte is sent: the name may resolve differently the second time."""
    if event == "connection.connect_tcp.complete":
        peer = str(info["return_value"].get_extra_info("server_addr")[0])
        if not is_public(peer):
            raise _not_public(peer)


def _check_answer(address: str, answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise BadInput(
            msg("{address} returned status {status_code}.", address=address[:100], status_code=answer.status_code),
            msg("Check the URL."),
        )
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        # A megabyte may decompress to a gigabyte.
        raise BadInput(
            msg("{address} sent compressed data, not plain text.", address=_host(address)),
            msg("Paste the text instead."),
        )
    if int(answer.headers.get("content-length", 0)) > MAX_BYTES:
        raise _too_large()


def _not_public(host: str) -> BadInput:
    return BadInput(msg("{host} is not on the public network.", host=host[:100]), msg("Paste the text instead."))


def _too_large() -> BadInput:
    return BadInput(
        msg("The text is larger than the {max_bytes} allowed.", max_bytes=format_bytes(MAX_BYTES)),
        msg("Use a part of it."),
    )


def _host(address: str) -> str:
    """The display name of a checked URL: without a password, and of limited length."""
    return (urlsplit(address).hostname or address)[:100]


def _readable(data: bytes, headers: httpx.Headers) -> str:
    kind = headers.get("content-type", "text/plain").lower()
    if not kind.startswith("text/"):
        raise BadInput(
            msg("The URL returned {kind}, not text.", kind=kind.split(";")[0]), msg("Use the URL of a text or a page.")
        )
    charset = re.search(r"charset=([\w-]+)", kind)
    try:
        text = data.decode(charset[1] if charset else "utf-8", "replace")
    except LookupError:
        text = data.decode("utf-8", "replace")
    return html_to_text(text) if "html" in kind else text


def html_to_text(page: str) -> str:
    """The text of an HTML page, without its markup."""
    text = _TAGS.sub("", _BLOCKS.sub("\n", _HIDDEN.sub("", page)))
    return re.sub(r"\n\s*\n+", "\n\n", html.unescape(text)).strip()
