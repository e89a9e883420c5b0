"""Which of a folder's or a repository's files make up a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from lowmem.errors import CorruptModel, ModelNotFound, UnsafeModel, Unsupported
from lowmem.messages import msg
from lowmem.models.files import Files, read_object
from lowmem.models.quantization import SIDE_FILES
from lowmem.models.tensors import Tensor

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "lowmem_export.json"
"""In folders of exported graphs, see `lowmem.runtime.onnx.manifest`."""

COMPANIONS = (
    CONFIG, "generation_config.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", *SIDE_FILES,
)  # fmt: skip
"""The files that a model may need beside its weights."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def model_files(files: Files) -> list[str]:
    """What makes up the model: configuration, tokenizer, and one copy of the weights; no pickles, no other formats.

    Of an exported folder only the manifest stands for the graphs, whose sizes it lists.

    Raises:
        The same as `weight_files`.
    """
    beside = [name for name in (*COMPANIONS, INDEX, MANIFEST) if name in files.names]
    return beside if MANIFEST in files.names else [*beside, *weight_files(files)]


def weight_files(files: Files) -> tuple[str, ...]:
    """The safetensors files of the model; other copies of the weights are left out.

    Raises:
        CorruptModel: a shard listed in the index is missing.
        UnsafeModel, ModelNotFound, Unsupported: there are no safetensors weights.
    """
    if INDEX in files.names:
        shards = sorted(set(map(str, _weight_map(files).values())))
        # These names become paths when the shards are downloaded or opened.
        if strange := [shard for shard in shards if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.safetensors", shard)]:
            raise CorruptModel(
                msg(
                    "{index} of {owner} names the file {strange!r}.",
                    index=INDEX,
                    owner=files.owner,
                    strange=strange[0][:80],
                ),
                msg("Choose another model."),
            )
        if missing := [shard for shard in shards if shard not in files.names]:
            raise CorruptModel(
                msg(
                    "{missing} of {shards} weight files of {owner} are missing, starting with {first!r}.",
                    missing=len(missing),
                    shards=len(shards),
                    owner=files.owner,
                    first=missing[0][:80],
                ),
                msg("Fetch the model again."),
            )
        return tuple(shards)
    if "model.safetensors" in files.names:
        return ("model.safetensors",)
    if "adapter_model.safetensors" in files.names:
        raise Unsupported(
            msg("{owner} is a LoRA adapter, not a complete model.", owner=files.owner), msg("Choose its base model.")
        )
    if any(name.endswith(".safetensors") for name in files.names):
        raise CorruptModel(
            msg("{owner} has safetensors files but no {index}.", owner=files.owner, index=INDEX),
            msg("Fetch the model again."),
        )
    if pickles := sorted(name for name in files.names if name.endswith(_PICKLES) and name != "training_args.bin"):
        raise UnsafeModel(
            msg(
                "{owner} has its weights only as pickle files ({pickles}), which can run code when opened.",
                owner=files.owner,
                pickles=pickles[0],
            ),
            msg("Choose a model with safetensors weights."),
        )
    raise ModelNotFound(
        msg("{owner} has a config.json but no weights.{names}", owner=files.owner, names=other_formats(files.names)),
        msg("Choose another model."),
    )


def has_chat_template(files: Files) -> bool:
    """Can the tokenizer format a conversation?"""
    if {"chat_template.jinja", "chat_template.json"} & set(files.names):
        return True
    return "tokenizer_config.json" in files.names and bool(
        read_object(files, "tokenizer_config.json").get("chat_template")
    )


def _weight_map(files: Files) -> dict[str, Any]:
    weight_map = read_object(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptModel(
            msg("{index} of {owner} has no weight_map.", index=INDEX, owner=files.owner), msg("Fetch the model again.")
        )
    return weight_map


def check_inventory(files: Files, tensors: tuple[Tensor, ...]) -> None:
    if not tensors:
        raise CorruptModel(
            msg("The weight files of {owner} contain no tensors.", owner=files.owner), msg("Fetch the model again.")
        )
    if INDEX in files.names and (lost := _weight_map(files).keys() - {tensor.name for tensor in tensors}):
        raise CorruptModel(
            msg("No weight file of {owner} contains {lost!r}.", owner=files.owner, lost=min(lost)[:80]),
            msg("Fetch the model again."),
        )


def other_formats(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    return msg(" It has GGUF files: name one, such as {gguf}.", gguf=gguf[0]) if gguf else ""
