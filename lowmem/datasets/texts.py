"""The texts that models are measured on, and those that calibration may see: never the same part.

Knows names, files and characters; nothing of tokens or models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from lowmem.datasets import hub_texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.units import MB, format_bytes

MANUAL, WIKITEXT, C4 = "manual", "wikitext2", "c4"
NAMES = (MANUAL, WIKITEXT, C4)

HEAD_SHARE = 0.75
"""The first three quarters of the manual's characters are its head, the rest its tail.

The manual repeats itself: paragraphs of the tail that are in the head as well, a tenth of it, are left out.
"""

MAX_FILE_BYTES = 16 * MB

SHINGLE_WORDS = 13
"""Texts overlap where so many words in a row are the same (the measure of arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what to call it beside a figure."""

    name: str
    text: str


def head(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that calibration may use.

    Args:
        source: "manual" (the head of the standard library's reference), "wikitext2" or "c4" (of their training
            parts, from the hub) or a file of one's own, which is used whole.

    Raises:
        BadInput: not a text that can be used.
        Offline: the hub cannot be reached.
    """
    return _part(source, "head", cancel)


def tail(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that quality is measured on, see `head`; of the hub's texts the part made for it."""
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
    if source in hub_texts.TEXTS:
        split = hub_texts.SPLITS[part]
        return Text(f"{source} ({split})", hub_texts.read(str(source), split, cancel or CancelToken()))
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


CHARACTERS_PER_TOKEN = 16
"""No more text than this is given to the tokenizer for each token that is wanted."""
