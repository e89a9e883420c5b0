"""Building a `ModelSpec` from the files of a model.

Works on folders and hub repositories, and reads configuration and headers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from lowmem.errors import CorruptModel, ModelNotFound, Unsupported
from lowmem.messages import msg
from lowmem.models.anatomy import Anatomy
from lowmem.models.derive import derive
from lowmem.models.encoded import encoding
from lowmem.models.files import Files, Ranged, fingerprint, read_fields, read_object
from lowmem.models.generation_config import sound_fields
from lowmem.models.gguf_file import MODEL_TYPES, read_ggufs
from lowmem.models.model_files import (
    CONFIG,
    MANIFEST,
    check_inventory,
    has_chat_template,
    model_files,
    other_formats,
    weight_files,
)
from lowmem.models.quantization import Quantization, description, parse_quantization
from lowmem.models.safetensors_header import read_header
from lowmem.models.spec import DTYPE_BYTES, ModelSource, ModelSpec, Tensor
from lowmem.models.tied_head import Place, copied_head


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
            msg("{owner} has no config.json.{names}", owner=files.owner, names=other_formats(files.names)),
            msg("Choose another model."),
        )
    config = read_object(files, CONFIG)
    if MANIFEST in files.names:
        return _describe_exported(files, source, config, encoders)
    weights = [files.ranged(file) for file in weight_files(files)]
    stored, places = _stored(weights)
    check_inventory(files, stored)
    copied = copied_head(config, {tensor.name: tensor for tensor in stored}, places.__getitem__)
    stored = tuple(tensor for tensor in stored if tensor.name != copied)
    described = description(files, config)
    kinds = encoding({tensor.name: tensor for tensor in stored}, described or {})
    quantization = None if described is None else parse_quantization(described)
    anatomy = _derived(
        {**config, "quantization_config": described} if described else config,
        source.name,
        stored,
        quantization if not kinds else None,
    )
    if kinds and not any(tensor.packed_layer for tensor in anatomy.tensors):
        quantization = None  # all of it is dequantized
    detail = source.detail or (msg("{kinds}, dequantized as it is read", kinds=kinds) if kinds else "")
    _check_generates(anatomy, source.name, encoders)
    return ModelSpec(
        source=dataclasses.replace(source, fingerprint=fingerprint(files, model_files(files)), detail=detail),
        **anatomy.shape(),
        quantization=quantization.method if quantization else "",
        stored=quantization,
        dequantized=kinds,
        size_on_disk=sum(file.size for file in weights),
        has_chat_template=has_chat_template(files),
        sampling=_sampling(files),
    )


def _sampling(files: Files) -> tuple[tuple[str, float], ...]:
    """The numbers of a generation_config.json."""
    found = sound_fields(files)
    return tuple((key, value) for key, value in sorted(found.items()) if type(value) in (int, float))


def _check_generates(anatomy: Anatomy, name: str, encoders: bool) -> None:
    """
    Raises:
        Unsupported: an encoder, and `encoders` does not accept them.
    """
    if anatomy.encoder and not encoders:
        raise Unsupported(
            msg(
                "{name} is an encoder ({model_type}): it reads text but does not generate any.",
                name=name,
                model_type=anatomy.model_type,
            ),
            msg("Choose a text generation model, such as one from the list."),
        )


def _stored(weights: list[Ranged]) -> tuple[tuple[Tensor, ...], dict[str, Place]]:
    """The tensors of all files, and where each is."""
    stored: list[Tensor] = []
    places: dict[str, Place] = {}
    for file in weights:
        header = read_header(file)
        stored += header.tensors
        places |= {tensor.name: (file, header.offsets[tensor.name], tensor.nbytes) for tensor in header.tensors}
    return tuple(stored), places


def _derived(
    config: dict[str, Any], name: str, stored: tuple[Tensor, ...], quantization: Quantization | None
) -> Anatomy:
    """The anatomy; where weights are missing because they are quantized in an unknown way, the error says so."""
    try:
        return derive(config, name, stored)
    except CorruptModel as error:
        if quantization is None or not (refusal := quantization.refusal()):
            raise
        raise Unsupported(
            msg("{model} cannot be run. {refusal}", model=name, refusal=refusal), msg("Choose the original model.")
        ) from error


def _describe_exported(files: Files, source: ModelSource, config: dict[str, Any], encoders: bool) -> ModelSpec:
    """A folder written by `lowmem.export`: the tensors of the original model, the size on disk of the graphs."""
    manifest = read_fields(files, MANIFEST, _Exported, msg("Export the model again."))
    stored = [Tensor(name, dtype, tuple(shape), size) for name, dtype, shape, size in manifest.model_tensors]
    if any(one.dtype not in DTYPE_BYTES or min(one.nbytes, *one.shape, 0) < 0 for one in stored):
        raise CorruptModel(
            msg("{manifest} of {owner} is damaged.", manifest=MANIFEST, owner=files.owner),
            msg("Export the model again."),
        )
    anatomy = derive(config, source.name, stored or None, "fp32")
    _check_generates(anatomy, source.name, encoders)
    return ModelSpec(
        source=dataclasses.replace(
            source, fingerprint=fingerprint(files, model_files(files)), licence=manifest.licence
        ),
        **anatomy.shape(),
        size_on_disk=sum(manifest.files.values()),
        has_chat_template=has_chat_template(files),
        sampling=_sampling(files),
        exported=manifest.precision,
    )


@dataclasses.dataclass(frozen=True)
class _Exported:
    """What describes the model in the manifest of `lowmem.runtime.onnx`."""

    precision: Literal["fp32", "fp16", "int8", "int4"]
    files: dict[str, int]
    model_tensors: list[tuple[str, str, list[int], int]]
    licence: str = ""


def _in_gguf(anatomy: Anatomy, stored: tuple[Tensor, ...]) -> Anatomy:
    """With the dtypes and sizes that the tensors of a GGUF file have there."""
    known = {tensor.name: tensor for tensor in stored}
    whole = len(stored) >= len(anatomy.tensors)  # then what is not known by name is there under another
    tensors = (
        dataclasses.replace(tensor, dtype=known[tensor.name].dtype, nbytes=known[tensor.name].nbytes)
        if tensor.name in known
        else tensor
        for tensor in anatomy.tensors
        if tensor.name in known or whole
    )
    return dataclasses.replace(anatomy, tensors=tuple(tensors))


def describe_gguf(files: Sequence[Ranged], source: ModelSource) -> ModelSpec:
    """The spec of a GGUF model: tensors under their names in transformers, with the size of their packed bytes.

    Args:
        files: all parts of a model that was split, in order.

    Raises:
        CorruptModel, Unsupported: see `read_gguf`; also an architecture that cannot be converted.
    """
    gguf = read_ggufs(files)
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
        **_in_gguf(derive(gguf.config(), source.name, None, "fp16", gguf.tensors), gguf.tensors).shape(),
        size_on_disk=sum(file.size for file in files),
        has_chat_template=gguf.has_chat_template,
    )
