"""Matches the parameters of a model with the tensors of a checkpoint by name, including older names and quantized layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from lowmem.errors import CorruptModel, Unsupported
from lowmem.messages import msg
from lowmem.models.conversions import Conversions, Target
from lowmem.models.entries import Source
from lowmem.models.experts import unstack
from lowmem.models.spec import CODE_DTYPES, PACKED_PARTS
from lowmem.models.unused import check_unused


class Inventory(Protocol):
    """A checkpoint, or the description of one."""

    tensors: dict[str, Source]


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


def match_names(model: PreTrainedModel, checkpoint: Inventory) -> dict[str, str]:
    """Parameter name -> name in `checkpoint.tensors`; tied parameters are left out.

    Names and layouts are those of `conversions.Conversions`. A parameter that is made of several stored tensors becomes
    a tensor of `checkpoint` under the parameter's own name. Stored tensors that the model has no parameter for must be
    known to be without effect on it, such as those of a vision tower, see `check_unused`.

    Raises:
        CorruptModel: a weight is missing, left over, or has another shape.
        Unsupported: layers whose activations are scaled.
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
    packed = {t.rpartition(".")[0] for t, e in checkpoint.tensors.items() if _is_packed_weight(t, e.dtype)}
    layers = {name: f"{name}.weight" for name in packed}
    plain = [name for name in checkpoint.tensors if packed_layer(name, packed) is None]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    conversions = Conversions(model)
    targets = conversions.targets([*plain, *layers.values()])
    parts: dict[str, str] = {}
    held: set[str] = set()
    for target in targets:
        if any(stored.removesuffix(".weight") in packed for stored in target.stored):
            held.add(target.name)
            for owner, stored in _layers(model, target):
                layer = stored.removesuffix(".weight")
                # Includes the bias: AutoGPTQ stores one of zeros even if the model has none.
                found = (part for part in (".weight", *PACKED_PARTS, ".bias") if f"{layer}{part}" in checkpoint.tensors)
                parts |= {owner + part: f"{layer}{part}" for part in found}
    unused = set(conversions.unused)
    for name, experts in _stacked_layers(model, packed).items():
        unused -= {f"{layer}.weight" for layer in experts}
        held.add(name)
        for number, layer in enumerate(experts):
            found = (part for part in (".weight", *PACKED_PARTS) if f"{layer}{part}" in checkpoint.tensors)
            parts |= {f"{name}.{number}{part}": f"{layer}{part}" for part in found}
    _tie_head(model, {target.name for target in targets})
    tied = set(tied_parameters(model))
    matched: dict[str, str] = {}
    for target in targets:
        if target.name not in tied and target.name not in held:
            matched[target.name] = target.add_to(checkpoint.tensors)
    matched |= {name: stored for name, stored in parts.items() if f"{name.rpartition('.')[0]}.weight" not in tied}
    _check(shapes, checkpoint, matched, tied | held)
    check_unused(model, unused, conversions.prefix)
    order = {name.rpartition(".")[0]: number for number, name in enumerate(model.state_dict())}
    return dict(sorted(matched.items(), key=lambda found: _place(order, found[0])))


def _stacked_layers(model: PreTrainedModel, packed: Collection[str]) -> dict[str, list[str]]:
    """Stacked projection -> its packed experts, named `projection.0` and so on: those of models that no file stores apart."""
    stacked = {name for name, parameter in model.named_parameters() if parameter.dim() == 3}
    found: dict[str, list[str]] = defaultdict(list)
    for layer in sorted(packed, key=dot_natural_key):
        name, _, number = layer.rpartition(".")
        if number.isdigit() and name in stacked:
            found[name].append(layer)
    for name in found:
        owner, _, member = name.rpartition(".")
        unstack(model.get_submodule(owner), member, 1)
    return found


def _place(order: Mapping[str, int], name: str) -> int:
    """Where the module of a tensor stands in the model; parts of packed weights may be named as if they were modules."""
    owner = name.rpartition(".")[0]
    while owner and owner not in order:
        owner = owner.rpartition(".")[0]
    return order.get(owner, len(order))


def _layers(model: PreTrainedModel, target: Target) -> Iterator[tuple[str, str]]:
    """(module, stored weight) of every layer that makes up a parameter; a stack of experts is taken apart for that.

    Raises:
        Unsupported: what is stored is not a layer of the model, but part of one or several.
    """
    if target.make is None:
        yield target.name.removesuffix(".weight"), target.stored[0]
        return
    owner, _, member = target.name.rpartition(".")
    module: Any = model.get_submodule(owner)
    count, pieces = target.shape[0], len(target.stored) // target.shape[0]
    if not target.joined or len(target.shape) != 3 or module.is_transposed or count * pieces != len(target.stored):
        raise Unsupported(
            msg(
                "{layer} is quantized, but transformers' {model_type} model has no such layer.",
                layer=target.stored[0],
                model_type=model.config.model_type,
            ),
            msg("Choose the original model."),
        )
    unstack(module, member, pieces)
    for number, stored in enumerate(target.stored):
        expert, piece = divmod(number, pieces)
        yield f"{target.name}.{expert}" + (f".{piece}" if pieces > 1 else ""), stored


def _tie_head(model: PreTrainedModel, found: Collection[str]) -> None:
    """Tie the output head to the embedding exactly where the files hold no head, whatever config.json says."""
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or id(head) not in names or f"{names[id(embedding)]}.weight" not in found:
        return
    weight = f"{names[id(head)]}.weight"
    if weight not in found:
        model.all_tied_weights_keys[weight] = f"{names[id(embedding)]}.weight"
        model.config.get_text_config().tie_word_embeddings = True
    elif model.all_tied_weights_keys.pop(weight, None):
        model.config.get_text_config().tie_word_embeddings = False


def packed_layer(name: str, packed: Collection[str]) -> str | None:
    """The layer among `packed` that a stored tensor belongs to, None if it is not part of one."""
    for part in (".weight", *PACKED_PARTS, ".bias"):
        if name.endswith(part) and (layer := name.removesuffix(part)) in packed:
            return layer
    return None


def _is_packed_weight(name: str, dtype: str) -> bool:
    return name.endswith(".qweight") or (name.endswith(".weight") and dtype in CODE_DTYPES)


def _check(
    shapes: Mapping[str, tuple[int, ...]], checkpoint: Inventory, matched: Mapping[str, str], others: Collection[str]
) -> None:
    """Check that everything but `others` has been found, in its shape: parameters, and buffers that are saved with them."""
    missing: list[str] = []
    for name, shape in shapes.items():
        if name in others:
            continue
        if (stored := matched.get(name)) is None:
            missing.append(name)
            continue
        entry = checkpoint.tensors[stored]
        if tuple(entry.shape) != shape:
            raise CorruptModel(
                msg(
                    "{name} is {shape} in the file, but config.json implies {expected}.",
                    name=stored,
                    shape=tuple(entry.shape),
                    expected=shape,
                ),
                msg("Fetch the model again."),
            )
    if missing:
        raise CorruptModel(
            msg(
                "{missing} weights that the model needs are missing from its files, starting with {first}.",
                missing=len(missing),
                first=missing[0],
            ),
            msg("Fetch the model again."),
        )


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the parameter it shares its tensor with}, for tied embeddings."""
    return dict(model.all_tied_weights_keys)
