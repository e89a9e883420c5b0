"""Building a `ModelSpec` from the files of a model: which of them are weights, and what they contain.

Works on folders and hub repositories, and reads configuration and headers only.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from lowmem.errors import CorruptModel, ModelNotFound, UnsafeModel, Unsupported
from lowmem.messages import msg
from lowmem.models.config import check_supported, read_shape
from lowmem.models.files import Files, Ranged, fingerprint, read_object
from lowmem.models.gguf_file import MODEL_TYPES, read_gguf
from lowmem.models.quantization import SIDE_FILES, read_quantization
from lowmem.models.safetensors_header import read_header
from lowmem.models.spec import ModelSource, ModelSpec, Tensor

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

_PACKED_HEADS = ("lm_head", "embed_out")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def describe(files: Files, source: ModelSource, encoders: bool = False) -> ModelSpec:
    """The spec of a model stored as config.json and safetensors.

    Args:
        source: the model's reference, name and license; the spec's own also carries the fingerprint of `files`.
        encoders: accept encoder models such as BERT too.

    Raises:
        ModelNotFound: no config.json, or no weights.
        UnsafeModel: weights only as pickles, or the repository's own code needed.
        CorruptModel: files that contradict each other, naming which.
        Unsupported: not a causal model that lowmem runs.
    """
    if CONFIG not in files.names:
        raise ModelNotFound(
            msg("{owner} has no config.json.{names}", owner=files.owner, names=_other_formats(files.names)),
            msg("Choose another model."),
        )
    config = read_object(files, CONFIG)
    check_supported(config, source.name, encoders)
    shape = read_shape(config, source.name)
    if MANIFEST in files.names:
        return _describe_exported(files, source, dataclasses.asdict(shape))
    weights = [files.ranged(file) for file in weight_files(files)]
    tensors = tuple(tensor for file in weights for tensor in read_header(file).tensors)
    _check_inventory(files, tensors)
    stored = read_quantization(files, config)
    tied = shape.tied or not any(t.is_output_embedding or t.packed_layer in _PACKED_HEADS for t in tensors)
    return ModelSpec(
        source=dataclasses.replace(source, fingerprint=fingerprint(files, model_files(files))),
        tensors=tensors,
        **dataclasses.asdict(dataclasses.replace(shape, tied=tied)),
        quantization=stored.method if stored else "",
        stored=stored,
        size_on_disk=sum(file.size for file in weights),
        has_chat_template=has_chat_template(files),
    )


def _describe_exported(files: Files, source: ModelSource, shape: dict[str, Any]) -> ModelSpec:
    """A folder written by `lowmem.export`: the tensors of the original model, the size on disk of the graphs."""
    manifest = read_object(files, MANIFEST)
    try:
        tensors = tuple(Tensor(n, dtype, tuple(dims), size) for n, dtype, dims, size in manifest["model_tensors"])
        precision, size = str(manifest["precision"]), sum(map(int, manifest["files"].values()))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptModel(
            msg("{manifest} of {owner} is damaged.", manifest=MANIFEST, owner=files.owner),
            msg("Export the model again."),
        ) from None
    licence = str(manifest.get("licence") or "")
    return ModelSpec(
        source=dataclasses.replace(source, fingerprint=fingerprint(files, model_files(files)), licence=licence),
        tensors=tensors,
        **shape,
        size_on_disk=size,
        has_chat_template=has_chat_template(files),
        exported=precision,
    )


def describe_gguf(file: Ranged, source: ModelSource) -> ModelSpec:
    """The spec of a GGUF file: tensors under their names in transformers, with the size of their packed bytes.

    Raises:
        CorruptModel, Unsupported: see `read_gguf`; also an architecture that cannot be converted.
    """
    gguf = read_gguf(file)
    arch = gguf.metadata.get("general.architecture")
    if arch not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise Unsupported(
            msg("{source} is a GGUF file of architecture {arch!r}.", source=source.name, arch=arch),
            msg("These can be used: {known}.", known=known),
        )
    licence = source.licence or str(gguf.metadata.get("general.license") or "")
    return ModelSpec(
        source=dataclasses.replace(source, licence=licence),
        tensors=gguf.tensors,
        **dataclasses.asdict(read_shape(gguf.config(), source.name)),
        size_on_disk=file.size,
        has_chat_template=gguf.has_chat_template,
    )


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
        msg("{owner} has a config.json but no weights.{names}", owner=files.owner, names=_other_formats(files.names)),
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


def _check_inventory(files: Files, tensors: tuple[Tensor, ...]) -> None:
    if not tensors:
        raise CorruptModel(
            msg("The weight files of {owner} contain no tensors.", owner=files.owner), msg("Fetch the model again.")
        )
    if INDEX in files.names and (lost := _weight_map(files).keys() - {tensor.name for tensor in tensors}):
        raise CorruptModel(
            msg("No weight file of {owner} contains {lost!r}.", owner=files.owner, lost=min(lost)[:80]),
            msg("Fetch the model again."),
        )


def _other_formats(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    return msg(" It has GGUF files: name one, such as {gguf}.", gguf=gguf[0]) if gguf else ""
