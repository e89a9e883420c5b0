"""The texts that models are measured on, and those that calibration may see: never the same part.

Knows names, files and characters; nothing of tokens or models.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lowmem.errors import BadInput, CorruptModel, LowMemError, Offline
from lowmem.events import CancelToken
from lowmem.models import hub
from lowmem.models.background import interruptible
from lowmem.settings import settings
from lowmem.units import MB, format_bytes

MANUAL, WIKITEXT = "manual", "wikitext2"
NAMES = (MANUAL, WIKITEXT)

HEAD_SHARE = 0.75
"""The first three quarters of the manual's characters are its head, the rest its tail.

The manual repeats itself: paragraphs of the tail that are in the head as well, a tenth of it, are left out.
"""

MAX_FILE_BYTES = 16 * MB

SHINGLE_WORDS = 13
"""Texts overlap where so many words in a row are the same (the measure of arXiv 2005.14165, appendix C)."""

# The archive of Merity et al. (arXiv 1609.07843) as llama.cpp's scripts fetch it: plain text, no Parquet.
_WIKITEXT_REPO = "datasets/ggml-org/ci"
_WIKITEXT_COMMIT = "927b3642933080f1b0e811e2f916e14c292992f9"
_WIKITEXT_FILE = "wikitext-2-raw-v1.zip"
_WIKITEXT_BYTES = 4_721_645
_WIKITEXT_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what to call it beside a figure."""

    name: str
    text: str


def head(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that calibration may use.

    Args:
        source: "manual" (the head of the standard library's reference), "wikitext2" (its training part,
            from the hub) or a file of one's own, which is used whole.

    Raises:
        BadInput: not a text that can be used.
        Offline: the hub cannot be reached.
    """
    return _part(source, "head", cancel)


def tail(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that quality is measured on, see `head`; of "wikitext2" the test part."""
    return _part(source, "tail", cancel)


def overlap(text: str, other: str) -> float:
    """The share of `text`, 0 to 1, that is in `other` word for word, in runs of `SHINGLE_WORDS` words."""
    words = text.split()
    size = min(SHINGLE_WORDS, len(words), len(other.split()))
    if not size:
        return 0.0
    wanted = {tuple(words[start : start + size]) for start in range(0, len(words) - size + 1, size)}
    others = other.split()
    found = wanted.intersection(tuple(others[start : start + size]) for start in range(len(others) - size + 1))
    return len(found) / len(wanted)


def _part(source: str | Path, part: str, cancel: CancelToken | None) -> Text:
    if source == MANUAL:
        return Text(f"{MANUAL} ({part})", _manual()[part])
    if source == WIKITEXT:
        split = "train" if part == "head" else "test"
        return Text(f"{WIKITEXT} ({split})", _wikitext(split, cancel or CancelToken()))
    return _file(Path(source))


@functools.cache
def _manual() -> dict[str, str]:
    """Head and tail of `pydoc_data.topics`: 465 KB of English reference prose, a little different in every Python."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    middle = whole.index("\n", int(HEAD_SHARE * len(whole))) + 1
    head, tail = whole[:middle], whole[middle:]
    seen = {paragraph.strip() for paragraph in head.split("\n\n")}
    kept = [paragraph for paragraph in tail.split("\n\n") if paragraph.strip() not in seen]
    return {"head": head, "tail": "\n\n".join(kept)}


def _file(path: Path) -> Text:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            largest = format_bytes(MAX_FILE_BYTES)
            raise BadInput(
                f"{path.name} has {format_bytes(size)}, more than the {largest} allowed.", "Give a part of it."
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"There is no file {path}.", f"Give a text file, or one of {', '.join(NAMES)}.") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not UTF-8 text (byte {error.start:,}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.", "Give a text file.") from None
    if not text.strip() or "\0" in text:
        raise BadInput(f"{path.name} holds {'no text' if not text.strip() else 'binary data'}.", "Give a text file.")
    return Text(path.name, text)


def _wikitext(split: str, cancel: CancelToken) -> str:
    archive = settings().home / "texts" / _WIKITEXT_FILE
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        unfinished = archive.with_suffix(".part")
        unfinished.write_bytes(_wikitext_archive(cancel))
        unfinished.replace(archive)
    with zipfile.ZipFile(archive) as files:
        return files.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")


def _wikitext_archive(cancel: CancelToken) -> bytes:
    here = hub.Repository(_WIKITEXT_REPO, _WIKITEXT_COMMIT, {})
    data = bytearray()
    try:
        for _, chunk in interruptible(hub.stream(here, _WIKITEXT_FILE), cancel):
            data += chunk
            if len(data) > _WIKITEXT_BYTES:
                break
    except Offline as error:
        raise Offline(
            f"WikiText-2 is not here. {error.message}", f"{error.hint} The text {MANUAL!r} is always here."
        ) from error
    except LowMemError as error:
        if isinstance(error, hub.ModelNotFound | hub.GatedModel):
            raise Offline("The hub does not give WikiText-2.", f"Use the text {MANUAL!r} or a file.") from error
        raise
    if hashlib.sha256(data).hexdigest() != _WIKITEXT_SHA256:
        raise CorruptModel(f"WikiText-2 arrived damaged ({len(data):,} bytes).", f"Try again, or use {MANUAL!r}.")
    return bytes(data)
