"""Checking that the tokenizer in a folder belongs to the model, without loading transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.files import LocalFolder, read_fields, read_object
from lowmem.models.foreign import build
from lowmem.models.spec import ModelSpec

_OPAQUE = ("tokenizer.model", "spiece.model", "vocab.txt")  # formats whose vocabulary size is not read here
_SLACK = 1000  # one id in 1,000 may exceed the embedding: Gemma 3's image token does


def check_tokenizer(folder: Path, spec: ModelSpec) -> None:
    """Refuse a model without a tokenizer, or with one that produces ids outside the model's embedding.

    Raises:
        CorruptModel: naming both sizes.
    """
    size = vocabulary_size(folder)
    if size is None:
        if any((folder / name).is_file() for name in _OPAQUE):
            return
        raise CorruptModel(
            msg("{model} has no tokenizer.", model=spec.name), msg("Add its tokenizer.json to the model's folder.")
        )
    if size > spec.vocab + spec.vocab // _SLACK:
        raise CorruptModel(
            msg(
                "The tokenizer of {model} belongs to another model: it has {size:,} tokens, the model {vocab:,}.",
                model=spec.name,
                size=size,
                vocab=spec.vocab,
            ),
            msg("Fetch the model again, or put its own tokenizer.json in its folder."),
        )


def vocabulary_size(folder: Path) -> int | None:
    """One more than the largest id in the base vocabulary; None if no file says.

    Raises:
        CorruptModel: a tokenizer file cannot be read.
    """
    files = LocalFolder(folder)
    if "tokenizer.json" in files.names:
        core = read_fields(files, "tokenizer.json", _Tokenizer).model
    elif "vocab.json" in files.names:
        what = msg("{name} of {owner}", name="vocab.json", owner=files.owner)
        core = build(_Core, {"vocab": read_object(files, "vocab.json")}, what)
    else:
        return None
    return len(core.vocab) if isinstance(core.vocab, list) else max(core.vocab.values(), default=-1) + 1


@dataclass(frozen=True)
class _Core:
    """A mapping of token to id (BPE, WordPiece), or a list of tokens (Unigram)."""

    vocab: dict[str, int] | list[Any]


@dataclass(frozen=True)
class _Tokenizer:
    model: _Core
