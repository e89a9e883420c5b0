"""Texts for calibration and for evaluation, which never overlap.

Knows names, files and characters, nothing about tokens or models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from lowmem.datasets import hub_texts
from lowmem.errors import BadInput
from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.units import MB, format_bytes

MANUAL, WIKITEXT, C4 = "manual", "wikitext2", "c4"
NAMES = (MANUAL, WIKITEXT, C4)

CALIBRATION_SHARE = 0.75
"""Share of the manual's characters, from the start, that is for calibration; the rest is for evaluation.

The manual repeats itself: a tenth of the paragraphs at the end also occur before, and are left out.
"""

MAX_FILE_BYTES = 16 * MB

SHINGLE_WORDS = 13
"""Number of consecutive words that must match to count as an overlap (arXiv 2005.14165, appendix C)."""


@dataclass(frozen=True, slots=True)
class Text:
    """A text and its name in reports."""

    name: str
    text: str


def calibration_text(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that is for calibration.

    Args:
        source: "manual" (the first part of the Python language reference), "wikitext2" or "c4" (their training
            splits, from the hub), or the path of a text file, which is used whole.

    Raises:
        BadInput: the file cannot be used.
        Offline: the hub cannot be reached.
    """
    return _part(source, "head", "train", cancel)


def evaluation_text(source: str | Path = MANUAL, cancel: CancelToken | None = None) -> Text:
    """The part of a text that is for evaluation, see `calibration_text`; of the hub's datasets the test split."""
    return _part(source, "tail", "test", cancel)


def overlap(text: str, other: str) -> float:
    """The share of `text`, 0 to 1, that also occurs in `other`, in runs of `SHINGLE_WORDS` words."""
    words = text.split()
    size = min(SHINGLE_WORDS, len(words), len(other.split()))
    if not size:
        return 0.0
    wanted = {tuple(words[start : start + size]) for start in range(0, len(words) - size + 1, size)}
    others = other.split()
    found = wanted.intersection(tuple(others[start : start + size]) for start in range(len(others) - size + 1))
    return len(found) / len(wanted)


def _part(source: str | Path, part: str, split: str, cancel: CancelToken | None) -> Text:
    if source == MANUAL:
        return Text(f"{MANUAL} ({part})", _manual()[part])
    if source in hub_texts.TEXTS:
        return Text(f"{source} ({split})", hub_texts.hub_text(str(source), split, cancel or CancelToken()))
    return _file(Path(source))


@functools.cache
def _manual() -> dict[str, str]:
    """Head and tail of `pydoc_data.topics`: 465 KB of English reference prose, slightly different in each Python."""
    from pydoc_data.topics import topics

    whole = "\n".join(topics[name] for name in sorted(topics))
    middle = whole.index("\n", int(CALIBRATION_SHARE * len(whole))) + 1
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
                msg(
                    "{path} is {size}, more than the {largest} allowed.",
                    path=path.name,
                    size=format_bytes(size),
                    largest=largest,
                ),
                msg("Use a part of it."),
            )
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(
            msg("There is no file {path}.", path=path),
            msg("Use a text file, or one of {names}.", names=", ".join(NAMES)),
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(
            msg("{path} is not UTF-8 text (byte {start:,}).", path=path.name, start=error.start),
            msg("Save it as UTF-8."),
        ) from None
    except OSError as error:
        raise BadInput(
            msg("{path} cannot be read: {strerror}.", path=path, strerror=error.strerror), msg("Use a text file.")
        ) from None
    if not text.strip():
        raise BadInput(msg("{path} contains no text.", path=path.name), msg("Use a text file."))
    if "\0" in text:
        raise BadInput(msg("{path} contains binary data.", path=path.name), msg("Use a text file."))
    return Text(path.name, text)


CHARACTERS_PER_TOKEN = 16
"""Upper bound on the characters that are passed to the tokenizer for each token needed."""
