"""generation_config.json: optional, so what is damaged in it is ignored, with a note in the log."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowmem.errors import LowMemError
from lowmem.models.files import Files, LocalFolder, read_object
from lowmem.models.foreign import build_leniently
from lowmem.models.model_files import CONFIG, GENERATION_CONFIG

log = logging.getLogger("lowmem.models")


@dataclass(frozen=True)
class _Fields:
    """The types of what lowmem or transformers use of it."""

    eos_token_id: int | list[int | None] | None = None
    bos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    sequence_bias: list[tuple[list[int], float]] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None


def generation_fields(folder: Path, name: str = GENERATION_CONFIG) -> dict[str, Any]:
    """What the file says, without what has the wrong type; {} if it is absent or damaged."""
    return sound_fields(LocalFolder(folder), name)


def sound_fields(files: Files, name: str = GENERATION_CONFIG) -> dict[str, Any]:
    """`generation_fields` of a folder or a repository."""
    if name not in files.names:
        return {}
    try:
        found = read_object(files, name)
    except LowMemError as error:
        log.warning("%s is ignored: %s", name, error.message)
        return {}
    _, wrong = build_leniently(_Fields, found)
    if wrong:
        log.warning("%s of %s: ignored is %s", name, files.owner, ", ".join(wrong))
    return {key: value for key, value in found.items() if key not in wrong}


def generation_config(folder: Path) -> Any:
    """transformers' `GenerationConfig` of a folder; None if it has none."""
    from transformers import GenerationConfig

    found = generation_fields(folder)
    known = {field.name: found[field.name] for field in fields(_Fields) if field.name in found}
    for values in filter(None, (found, known)):
        try:
            return GenerationConfig.from_dict(values)
        except Exception as error:  # whatever transformers makes of other fields
            log.warning("%s of %s: %s", GENERATION_CONFIG, folder.name, error)
    return None


def eos_token_ids(folder: Path) -> list[int]:
    """The end-of-sequence tokens, of config.json where generation_config.json names none."""
    for name in (GENERATION_CONFIG, CONFIG):
        found = generation_fields(folder, name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if ids := [token for token in ids if token is not None]:
            return ids
    return []
