"""Matches the parameters of a model with the tensors of a checkpoint by name, including older names and quantized layers."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from lowmem.errors import CorruptModel, Unsupported
from lowmem.messages import msg
from lowmem.models.checkpoint import Checkpoint
from lowmem.models.spec import CODE_DTYPES, PACKED_PARTS

FOLDED_SCALES = ".act.scales"
"""A layer that AutoAWQ adds to families without a preceding layer to fold its scales into (GPT-NeoX, Falcon, Starcoder2)."""


def by_module(stored: dict[str, str]) -> dict[str, dict[str, str]]:
    """Group names by module: {"layer.weight": name} -> {"layer": {"weight": name}}."""
    owners: dict[str, dict[str, str]] = {}
    for parameter, name in stored.items():
        # bitsandbytes names its quantization state as if it were part of the weight: "layer.weight.absmax".
        owner, inner, member = parameter.rpartition(".weight.")
        if inner:
            member = f"weight.{member}"
        else:
            owner, _, member = parameter.rpartition(".")
        owners.setdefault(owner, {})[member] = name
    return owners


def match_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter name -> stored name, with or without the base model's prefix; tied parameters are left out.

    Raises:
        CorruptModel: a weight is missing or has another shape.
        Unsupported: the family stores its weights in a layout that needs rearranging.
    """
    if folded := next((name for name in checkpoint.tensors if name.endswith(FOLDED_SCALES)), None):
        raise Unsupported(
            msg(
                "{folded} scales activations, which lowmem does not support for {model_type} models.",
                folded=folded,
                model_type=model.config.model_type,
            ),
            msg("Choose a GPTQ checkpoint, or the original model."),
        )
    prefix = f"{model.base_model_prefix}."
    tied = set(tied_parameters(model))
    matched: dict[str, str] = {}
    missing: list[str] = []
    for parameter, tensor in [*model.named_parameters(), *_persistent_buffers(model)]:
        options = (parameter, parameter.removeprefix(prefix), prefix + parameter)
        if packed := _packed_parts(parameter, options, checkpoint):
            matched |= {} if parameter in tied else packed
            continue
        name = next((n for n in options if n in checkpoint.tensors), None)
        if name is None:
            if parameter not in tied:
                missing.append(parameter)
            continue
        if parameter in tied:
            continue
        shape = checkpoint.tensors[name].shape
        if tuple(shape) != tuple(tensor.shape):
            raise CorruptModel(
                msg(
                    "{name} is {shape} in the file, but config.json implies {expected}.",
                    name=name,
                    shape=tuple(shape),
                    expected=tuple(tensor.shape),
                ),
                msg("Fetch the model again."),
            )
        matched[parameter] = name
    if missing:
        raise CorruptModel(
            msg(
                "{missing} weights that the model needs are missing from its files, starting with {first}.",
                missing=len(missing),
                first=missing[0],
            ),
            msg("Fetch the model again; if the error persists, this family is not supported yet."),
        )
    return matched


def _packed_parts(parameter: str, options: tuple[str, ...], checkpoint: Checkpoint) -> dict[str, str]:
    """Tensors stored in place of a quantized weight, {} if the weight itself is stored.

    Includes the bias: AutoGPTQ stores one of zeros even if the model has none.
    """
    if not parameter.endswith(".weight"):
        return {}
    layers = [name.removesuffix(".weight") for name in options]
    layer = next((name for name in layers if _is_packed(name, checkpoint)), None)
    if layer is None:
        return {}
    stored = [part for part in (".weight", *PACKED_PARTS, ".bias") if f"{layer}{part}" in checkpoint.tensors]
    return {parameter.removesuffix(".weight") + part: f"{layer}{part}" for part in stored}


def _is_packed(layer: str, checkpoint: Checkpoint) -> bool:
    weight = checkpoint.tensors.get(f"{layer}.weight")
    return f"{layer}.qweight" in checkpoint.tensors or (weight is not None and weight.dtype in CODE_DTYPES)


def _persistent_buffers(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    persistent = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in persistent and buffer.is_meta]


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the parameter it shares its tensor with}, for tied embeddings."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    return dict(getattr(model, "_tied_weights_keys", None) or {})
