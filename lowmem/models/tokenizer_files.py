"""Checking that the tokenizer in a folder belongs to the model, without loading transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowmem.errors import CorruptModel
from lowmem.messages import msg
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
        CorruptModel: a tokenizer file cannot be parsed.
    """
    for name in ("tokenizer.json", "vocab.json"):
        if (folder / name).is_file():
            try:
                fields = json.loads((folder / name).read_text(encoding="utf-8"))
                return _size(fields["model"]["vocab"] if name == "tokenizer.json" else fields)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise CorruptModel(
                    msg("{name} in {folder} cannot be read.", name=name, folder=folder.name),
                    msg("Fetch the model again."),
                ) from None
    return None


def _size(vocabulary: Any) -> int:
    """A mapping of token to id (BPE, WordPiece), or a list (Unigram)."""
    if isinstance(vocabulary, list):
        return len(vocabulary)
    return max((int(number) for number in vocabulary.values()), default=-1) + 1
