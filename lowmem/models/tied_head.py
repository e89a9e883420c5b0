"""Whether a checkpoint stores the output head twice: as the embedding, and under its own name.

Where config.json says that the two are one, files that hold a head of its own are right: some were trained apart, or come from
a tool that never writes that they were (https://github.com/huggingface/transformers/pull/42612). Only a copy of the
embedding is not read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem.models.encoded import Stored
from lowmem.models.files import LocalFile, Ranged
from lowmem.models.model_files import HEADS

CHUNK_BYTES = 1 << 22
SAMPLES, SAMPLE_BYTES = 4, 4096
"""What is compared of remote files, and first of local ones."""

Place = tuple[Ranged, int, int]
"""A file, and the offset and number of bytes of a tensor in it."""


def copied_head(config: Mapping[str, Any], tensors: Mapping[str, Stored], place: Callable[[str], Place]) -> str:
    """The name of an output head that equals the embedding, "" if there is none or config.json says that they are two."""
    text = config.get("text_config")
    told = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, Mapping)]
    head = next((name for name in tensors if name.endswith(HEADS)), "")
    if not head or (False in told and True not in told):
        return ""
    outside = (name for name in tensors if name != head and not re.search(r"\.\d+\.", name))
    alike = [name for name in outside if _form(tensors[name]) == _form(tensors[head])]
    return head if any(_same(place(name), place(head)) for name in alike) else ""


def _form(tensor: Stored) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _same(one: Place, other: Place) -> bool:
    nbytes = one[2]
    for number in range(SAMPLES):
        start = number * (nbytes - min(nbytes, SAMPLE_BYTES)) // max(1, SAMPLES - 1)
        if _read(one, start, SAMPLE_BYTES) != _read(other, start, SAMPLE_BYTES):
            return False
    local = [place[0] for place in (one, other) if isinstance(place[0], LocalFile)]
    if len(local) < 2:
        return True
    states = [(file.path, file.path.stat().st_mtime_ns) for file in local]
    return _same_locally(*states[0], one[1], *states[1], other[1], nbytes)


@functools.cache
def _same_locally(
    path: Path,
    changed: int,  # noqa: ARG001  part of the key
    offset: int,
    other: Path,
    other_changed: int,  # noqa: ARG001
    other_offset: int,
    nbytes: int,
) -> bool:
    places: tuple[Place, Place] = ((LocalFile(path), offset, nbytes), (LocalFile(other), other_offset, nbytes))
    starts = range(0, nbytes, CHUNK_BYTES)
    return all(_read(places[0], start, CHUNK_BYTES) == _read(places[1], start, CHUNK_BYTES) for start in starts)


def _read(place: Place, start: int, length: int) -> bytes:
    file, offset, nbytes = place
    return file.read(offset + start, min(length, nbytes - start))
