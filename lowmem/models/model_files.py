"""Which of a folder's or a repository's files make up a model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lowmem.errors import CorruptModel, ModelNotFound, UnsafeModel, Unsupported
from lowmem.messages import msg
from lowmem.models.files import Files, read_fields
from lowmem.models.quantization import SIDE_FILES
from lowmem.models.tensors import Tensor

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "lowmem_export.json"
"""In folders of exported graphs, see `lowmem.runtime.onnx.manifest`."""

COMPANIONS = (
    CONFIG, GENERATION_CONFIG, "chat_template.jinja", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", *SIDE_FILES,
)  # fmt: skip
"""The files that a model may need beside its weights."""

HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
"""What output heads are called in checkpoints."""

_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def model_files(files: Files) -> list[str]:
    """What makes up the model: configuration, tokenizer, and one copy of the weights; no pickles, no other formats.

    Of an exported folder only the manifest stands for the graphs, whose sizes it lists.

    Raises:
        The same as `weight_files`.
    """
    beside = [name for name in (*COMPANIONS, _index(files), MANIFEST) if name in files.names]
    return beside if MANIFEST in files.names else [*beside, *weight_files(files)]


def weight_files(files: Files) -> tuple[str, ...]:
    """The safetensors files of the model; other copies of the weights are left out.

    Raises:
        CorruptModel: a shard listed in the index is missing.
        UnsafeModel, ModelNotFound, Unsupported: there are no safetensors weights.
    """
    if index := _index(files):
        shards = sorted(set(_weight_map(files, index).values()))
        # These names become paths when the shards are downloaded or opened.
        if strange := [
            shard for shard in shards if not (_is_shard(shard) and (shard in files.names or "/" not in shard))
        ]:
            raise CorruptModel(
                msg(
                    "{index} of {owner} names the file {strange!r}.",
                    index=index,
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
    if found := _without_index(files):
        return found
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


def _is_shard(name: str) -> bool:
    """Whether a name in an index is that of a file in the model's folder, or in a folder within it."""
    part = r"[A-Za-z0-9][\w.-]*"
    return re.fullmatch(rf"({part}/)?{part}\.safetensors", name) is not None


def _index(files: Files) -> str:
    """The name of the index of the shards, "" without one; tools that name the weights otherwise name it after them."""
    if INDEX in files.names or "model.safetensors" in files.names:
        return INDEX if INDEX in files.names else ""
    others = [name for name in files.names if name.endswith(".safetensors.index.json") and "/" not in name]
    return others[0] if len(others) == 1 else ""


def _without_index(files: Files) -> tuple[str, ...]:
    """The weight files of a folder without an index: one of any name, or all shards of one name; () if it is neither."""
    weights = sorted(
        name
        for name in files.names
        if name.endswith(".safetensors") and "/" not in name and not name.startswith("adapter_")
    )
    shards: dict[tuple[str, int], list[str]] = {}
    for name in weights:
        if numbered := _SHARD.fullmatch(name):
            shards.setdefault((numbered[1], int(numbered[3])), []).append(name)
    complete = [tuple(found) for (_, count), found in shards.items() if len(found) == count]
    whole = [name for name in weights if not _SHARD.fullmatch(name)]
    if "model.safetensors" in whole or (len(whole) == 1 and not complete):
        return ("model.safetensors" if "model.safetensors" in whole else whole[0],)
    return complete[0] if len(complete) == 1 else ()


def has_chat_template(files: Files) -> bool:
    """Can the tokenizer format a conversation?

    Raises:
        CorruptModel: a configuration of the tokenizer is damaged.
    """
    configs = (name for name in ("chat_template.json", "tokenizer_config.json") if name in files.names)
    return "chat_template.jinja" in files.names or any(
        read_fields(files, name, _TokenizerConfig).chat_template for name in configs
    )


@dataclass(frozen=True)
class _TokenizerConfig:
    """`chat_template` is a template, or several, each an object with "name" and "template"."""

    chat_template: str | list[_NamedTemplate] | None = None


@dataclass(frozen=True)
class _NamedTemplate:
    name: str
    template: str


@dataclass(frozen=True)
class _Index:
    """The index of the shards: the file of every tensor."""

    weight_map: dict[str, str]


def _weight_map(files: Files, index: str) -> dict[str, str]:
    weight_map = read_fields(files, index, _Index).weight_map
    if not weight_map:
        raise CorruptModel(
            msg("{index} of {owner} has no weight_map.", index=index, owner=files.owner), msg("Fetch the model again.")
        )
    return weight_map


def check_inventory(files: Files, tensors: tuple[Tensor, ...]) -> None:
    if not tensors:
        raise CorruptModel(
            msg("The weight files of {owner} contain no tensors.", owner=files.owner), msg("Fetch the model again.")
        )
    index = _index(files)
    lost = _weight_map(files, index).keys() - {tensor.name for tensor in tensors} if index else set()
    # Where the head is the embedding, some tools list it and store it once.
    if lost := {name for name in lost if not name.endswith(HEADS)}:
        raise CorruptModel(
            msg("No weight file of {owner} contains {lost!r}.", owner=files.owner, lost=min(lost)[:80]),
            msg("Fetch the model again."),
        )


def other_formats(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    return msg(" It has GGUF files: name one, such as {gguf}.", gguf=gguf[0]) if gguf else ""
