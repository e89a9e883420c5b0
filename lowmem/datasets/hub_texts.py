"""WikiText-2 and C4 from the hub, downloaded once and stored as plain text.

Each comes from the file that other projects use, so that perplexities can be compared. `texts` decides what they are
used for.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lowmem.background import interruptible
from lowmem.errors import CorruptModel, GatedModel, LowMemError, ModelNotFound, Offline
from lowmem.events import CancelToken
from lowmem.messages import msg
from lowmem.models import hub
from lowmem.settings import settings

C4_CHARACTERS = 4_000_000
"""Characters read from the start of a split of C4: a million tokens out of 300 GB."""

# The archive of Merity et al. (arXiv 1609.07843) that llama.cpp's scripts download: plain text, no Parquet.
_WIKITEXT_BYTES = 4_721_645
_WIKITEXT_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"

# The files and the commit that the published GPTQ code uses (arXiv 2210.17323).
_C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
_GZIP = 16 + zlib.MAX_WBITS


@dataclass(frozen=True)
class _Source:
    """A dataset: its display name, its location, and the function that downloads one split."""

    label: str
    repo: str
    commit: str
    fetch: Callable[[_Source, str, CancelToken], str]


def hub_text(name: str, split: str, cancel: CancelToken) -> str:
    """The split "train" or "test" of the dataset `name` of `TEXTS`.

    Raises:
        Offline: it has not been downloaded yet, and the hub cannot be reached or refuses it.
        CorruptModel: the download is damaged.
    """
    file = settings().home / "texts" / f"{name}-{split}.txt"
    if not file.is_file():
        text = _fetch(TEXTS[name], split, cancel)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    return file.read_text(encoding="utf-8")


def _fetch(source: _Source, split: str, cancel: CancelToken) -> str:
    try:
        return source.fetch(source, split, cancel)
    except Offline as error:
        raise Offline(
            msg("{label} has not been downloaded. {message}", label=source.label, message=error.message),
            msg("{hint} The text 'manual' works offline.", hint=error.hint),
        ) from error
    except LowMemError as error:
        if isinstance(error, ModelNotFound | GatedModel):
            raise Offline(
                msg("The hub refused {label}.", label=source.label), msg("Use the text 'manual' or a file.")
            ) from error
        raise


def _chunks(source: _Source, file: str, cancel: CancelToken) -> Iterator[bytes]:
    repository = hub.Repository(source.repo, source.commit, {})
    for _, chunk in interruptible(hub.stream(repository, file), cancel):
        yield chunk


def _wikitext(source: _Source, split: str, cancel: CancelToken) -> str:
    data = bytearray()
    for chunk in _chunks(source, "wikitext-2-raw-v1.zip", cancel):
        data += chunk
        if len(data) > _WIKITEXT_BYTES:
            break
    if hashlib.sha256(data).hexdigest() != _WIKITEXT_SHA256:
        raise _damaged(source, len(data))
    with zipfile.ZipFile(io.BytesIO(data)) as files:
        return files.read(f"wikitext-2-raw/wiki.{split}.raw").decode("utf-8")


def _c4(source: _Source, split: str, cancel: CancelToken) -> str:
    unpacker, rest, texts, characters, received = zlib.decompressobj(_GZIP), b"", [], 0, 0
    try:
        for chunk in _chunks(source, _C4_FILES[split], cancel):
            received += len(chunk)
            *lines, rest = (rest + unpacker.decompress(chunk)).split(b"\n")
            texts += [json.loads(line)["text"] for line in lines]
            characters = sum(map(len, texts))
            if characters >= C4_CHARACTERS:
                break
    except (zlib.error, ValueError, KeyError, TypeError):
        raise _damaged(source, received) from None
    if not texts:
        raise _damaged(source, received)
    return "\n\n".join(texts)[:C4_CHARACTERS]


def _damaged(source: _Source, count: int) -> CorruptModel:
    return CorruptModel(
        msg("The download of {label} is damaged ({count:,} bytes).", label=source.label, count=count),
        msg("Try again, or use the text 'manual'."),
    )


TEXTS = {
    "wikitext2": _Source("WikiText-2", "datasets/ggml-org/ci", "927b3642933080f1b0e811e2f916e14c292992f9", _wikitext),
    "c4": _Source("C4", "datasets/allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87", _c4),
}
