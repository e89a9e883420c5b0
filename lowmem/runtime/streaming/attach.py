"""Makes a model stream the blocks that a placement offloads: which modules compute with stored weights, and where from.

The loader uses it for offloaded blocks; `apply` and `Offloaded.remove` do the same to a model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.errors import BadInput, CorruptModel, Unsupported
from lowmem.generate.decoding import decoder_blocks
from lowmem.kernels import bnb_linear, packed_linear
from lowmem.kernels.stored_layers import StoredEmbedding, StoredInt8, StoredLinear, StoredNf4, StoredPacked
from lowmem.messages import msg
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint
from lowmem.models.entries import Entry
from lowmem.models.matching import by_module, match_names
from lowmem.models.modules import set_tensor
from lowmem.models.quantization import BNB, Quantization
from lowmem.models.spec import CODE_DTYPES
from lowmem.planning.placement import Placement, block_index, resident_place
from lowmem.runtime.streaming.blocks import BlockFile, block_file
from lowmem.runtime.streaming.streamer import Disk, Mapped, Source, Streamer
from lowmem.runtime.streaming.transfer import Host, OnDevice

Names = Mapping[str, str]
"""Parameter name -> stored name."""

QUANTIZED = (
    msg("The model's layers are quantized: they cannot be moved once they are loaded."),
    msg("Load the model with a placement instead."),
)


def offloaded_names(
    model: PreTrainedModel, names: Names, placement: Placement, device: torch.device
) -> dict[int, Names]:
    """The names of the weights of every offloaded block, by block.

    Raises:
        Unsupported: the model's list of blocks is not where its family is known to have it.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    blocks = decoder_blocks(model)
    if len(blocks) != len(placement.blocks):
        raise Unsupported(
            msg(
                "The {blocks} blocks of this {model_type} model cannot be located.",
                model_type=model.config.model_type,
                blocks=len(placement.blocks),
            ),
            msg("Run it without offloading."),
        )
    found: dict[int, Names] = {}
    resident = resident_place(device.type if device.type == "cpu" else "cuda")
    for index, place in enumerate(placement.blocks):
        if place != resident:
            prefix = paths[id(blocks[index])] + "."
            found[index] = {name: stored for name, stored in names.items() if name.startswith(prefix)}
    return found


def stream(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    blocks: Mapping[int, Names],
    placement: Placement,
    device: torch.device,
    dtype: torch.dtype,
    stored: Quantization | None = None,
) -> Streamer:
    """Stream `blocks` of an otherwise loaded model from where `placement` puts them.

    Raises:
        ModelNotFound, CorruptModel: the files cannot be opened, or a packed layer has wrong shapes.
    """
    files = [_prepare(model, checkpoint, index, names, dtype, stored) for index, names in blocks.items()]
    source = _source(files, placement, device, dtype)
    return Streamer(dict(enumerate(decoder_blocks(model))), files, source, device, dtype)


def can_map(checkpoint: Checkpoint, blocks: Mapping[int, Names], dtype: torch.dtype) -> bool:
    """Whether these weights can be used in place: all must be stored in one piece, in the compute dtype."""
    stored = [checkpoint.tensors[name] for names in blocks.values() for name in names.values()]
    whole = all(isinstance(entry, Entry) and len(entry.extents) == 1 for entry in stored)
    return whole and all(TORCH_DTYPES[entry.dtype] == dtype for entry in stored)


def _source(files: list[BlockFile], placement: Placement, device: torch.device, dtype: torch.dtype) -> Source:
    if device.type == "cpu":
        return Mapped(files, dtype) if placement.mapped else Disk(files)
    ram = [file for file in files if placement.blocks[file.index] == "ram"]
    disk = [file for file in files if placement.blocks[file.index] == "disk"]
    return OnDevice(Host(ram, disk, pinned=device.type == "cuda"), files, device)


def _prepare(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    index: int,
    names: Names,
    dtype: torch.dtype,
    stored: Quantization | None,
) -> BlockFile:
    members = []
    for owner, parts in by_module(dict(names)).items():
        module = model.get_submodule(owner)
        runner = as_stored(module, checkpoint, parts, dtype, stored)
        if runner is not module:
            model.set_submodule(owner, runner)
        stays = ("weight_format", *(runner.described if isinstance(runner, StoredNf4) else ()))
        members += [(runner, m, checkpoint.tensors[name]) for m, name in parts.items() if m not in stays]
    return block_file(index, members)


def as_stored(
    module: nn.Module, checkpoint: Checkpoint, members: Names, dtype: torch.dtype, stored: Quantization | None = None
) -> nn.Module:
    """A module that computes the same as `module` from the tensors as they are stored; `module` itself if it can do that."""
    if "qweight" in members:
        return _packed(module, checkpoint, members, stored)
    if "weight" in members and checkpoint.tensors[members["weight"]].dtype in CODE_DTYPES:
        return _codes(module, checkpoint, members, dtype, stored)
    if "weight" not in members or TORCH_DTYPES[checkpoint.tensors[members["weight"]].dtype] == dtype:
        return module
    weight = getattr(module, "weight")  # noqa: B009  what it is, is checked below
    if isinstance(module, (nn.Linear, Conv1D)):
        return StoredLinear(weight, module.bias, transposed=isinstance(module, Conv1D))
    if isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or hasattr(module, "embed_scale")):
        return StoredEmbedding(weight, dtype, float(getattr(module, "embed_scale", 1.0)))
    return module


def checked_layer(
    module: nn.Module, checkpoint: Checkpoint, members: Names, stored: Quantization | None, layer: str
) -> tuple[Quantization, int, int]:
    """Quantization, outputs and inputs of the quantized layer that takes the place of `module`.

    Args:
        members: member -> stored name of its tensors.
        layer: its stored name.

    Raises:
        Unsupported: `module` is not a linear layer.
        CorruptModel: a tensor is missing or has another shape.
    """
    if stored is None or not isinstance(module, (nn.Linear, Conv1D)):
        raise Unsupported(
            msg("{layer} is quantized, which is not supported for a {kind}.", layer=layer, kind=type(module).__name__),
            msg("Choose the original model."),
        )
    stored = stored.of(layer)
    outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
    shapes = {part: checkpoint.tensors[name].shape for part, name in members.items()}
    packed_linear.check_shapes(stored, layer, outputs, inputs, shapes)
    return stored, outputs, inputs


def _packed(module: nn.Module, checkpoint: Checkpoint, members: Names, stored: Quantization | None) -> StoredPacked:
    layer = members["qweight"].removesuffix(".qweight")
    stored, outputs, inputs = checked_layer(module, checkpoint, members, stored, layer)
    return StoredPacked(stored, layer, inputs, outputs)


def _codes(
    module: nn.Module, checkpoint: Checkpoint, members: Names, dtype: torch.dtype, stored: Quantization | None
) -> nn.Module:
    """int8 of compressed-tensors or bitsandbytes, or 4 bits of bitsandbytes, whose quantization state stays resident."""
    layer = members["weight"].removesuffix(".weight")
    stored, outputs, inputs = checked_layer(module, checkpoint, members, stored, layer)
    weight: Any = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if stored.bits == 8:
        return StoredInt8(weight, largest=127 if stored.method == BNB else 1)
    parts = {part: checkpoint.read(name) for part, name in members.items()}
    made: Any = bnb_linear.stored4(layer, parts, outputs, inputs, torch.device("cpu"), dtype)
    runner = StoredNf4(weight, made.weight.quant_state, inputs, outputs)
    runner.described = tuple(part for part in members if part.startswith("weight."))
    return runner


@dataclass
class Offloaded:
    """A model in memory with some blocks offloaded; `remove` loads them again."""

    model: PreTrainedModel
    streamer: Streamer
    _modules: dict[str, nn.Module]
    _members: dict[str, nn.Parameter]
    _folder: Path
    _names: dict[str, str]

    def remove(self) -> None:
        """Load the blocks again and stop streaming; the model is as it was before `apply`.

        Raises:
            CorruptModel, ModelNotFound: the files are not what they were; the model stays offloaded.
        """
        with Checkpoint(self._folder) as checkpoint:
            whole = {name: _like(old) for name, old in self._members.items()}
            for name, tensor in whole.items():
                checkpoint.read_into(self._names[name], tensor)
        self.streamer.close()
        for owner, module in self._modules.items():
            self.model.set_submodule(owner, module)
        for name, tensor in whole.items():
            set_tensor(self.model, name, tensor)


def apply(model: PreTrainedModel, folder: Path, placement: Placement) -> Offloaded:
    """Offload blocks of a model in memory; `folder` must hold the very weights that the model has.

    Outputs stay the same, bit for bit on a CPU if the files store the compute dtype.

    Raises:
        Unsupported: the model's layers are quantized, or its weights are not those of the folder.
        BadInput: the placement offloads nothing.
        CorruptModel, ModelNotFound: the folder cannot be read.
    """
    device, dtype = model.device, model.dtype
    if _is_quantized(model):
        raise Unsupported(*QUANTIZED)
    with Checkpoint(folder) as checkpoint:
        names = match_names(model, checkpoint)
        blocks = offloaded_names(model, names, placement, device)
        if not blocks:
            raise BadInput(msg("No blocks are offloaded."), msg("Choose blocks to offload."))
        moved = {name: stored for block in blocks.values() for name, stored in block.items()}
        _check_dense(checkpoint, blocks)
        _check_same(model, checkpoint, moved)
        if placement.mapped and not can_map(checkpoint, blocks, dtype):
            raise Unsupported(
                msg("Weights that are stored in another dtype cannot be used in place."),
                msg("Stream them instead."),
            )
        members = {name: model.get_parameter(name) for name in moved}
        kept = {name: _outline(parameter) for name, parameter in members.items()}
        modules = {owner: model.get_submodule(owner) for owner in by_module(moved)}
        for name, parameter in members.items():
            set_tensor(model, name, parameter.to("meta"))
        streamer = stream(model, checkpoint, blocks, placement, device, dtype)
    return Offloaded(model, streamer, modules, kept, folder, moved)


def _is_quantized(model: PreTrainedModel) -> bool:
    """Whether a layer is one of lowmem's kernels, or holds codes (bitsandbytes')."""
    codes = any(not parameter.is_floating_point() for parameter in model.parameters())
    return codes or any(type(module).__module__.startswith("lowmem.kernels.") for module in model.modules())


def _outline(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter's shape, strides and dtype on the meta device, with its real device as the attribute `device_of_data`."""
    outline = nn.Parameter(
        torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"),
        requires_grad=False,
    )
    outline.device_of_data = parameter.device  # type: ignore[attr-defined]
    return outline


def _like(outline: nn.Parameter) -> torch.Tensor:
    return torch.empty_strided(outline.shape, outline.stride(), dtype=outline.dtype, device=outline.device_of_data)  # type: ignore[attr-defined]


def _check_dense(checkpoint: Checkpoint, blocks: Mapping[int, Names]) -> None:
    """Refuse blocks with quantized matrices, in the files or in memory."""
    found = {stored for names in blocks.values() for stored in names.values()}
    for name, entry in checkpoint.tensors.items():
        missing = name.endswith(".weight") and (entry.dtype in CODE_DTYPES or name not in found)
        if block_index(name) in blocks and (missing or name.endswith(".qweight")):
            raise Unsupported(*QUANTIZED)


def _check_same(model: PreTrainedModel, checkpoint: Checkpoint, names: Names) -> None:
    """Compare the vectors of each block with the files: a fine-tuned copy would differ in every one."""
    for name, stored in names.items():
        parameter = model.get_parameter(name)
        if parameter.dim() == 1 and not torch.equal(checkpoint.read(stored, parameter.dtype), parameter.cpu()):
            raise CorruptModel(
                msg("{name} in memory differs from the model's folder.", name=name),
                msg("Save the model, then offload that."),
            )
