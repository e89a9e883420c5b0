"""Loads the model of a plan, never holding more memory than the plan says.

The model is built without weights (on torch's meta device) and filled from safetensors files one tensor at a time, each in its
final precision and layout. Memory peaks at the finished weights plus one tensor, not at two copies of the model.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lowmem.errors import CorruptModel, Unsupported, first_line, is_out_of_memory
from lowmem.events import CancelToken, Step
from lowmem.generate.tokens import check_ids
from lowmem.kernels import packed_linear
from lowmem.kernels.packed_rows import PackedEmbedding, PackedHead, PackedRows
from lowmem.kernels.stored_layers import StoredEmbedding, StoredLinear
from lowmem.machine.monitor import trim_heap
from lowmem.messages import msg
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint
from lowmem.models.dequantize import packed_rows
from lowmem.models.encoded import SCALES
from lowmem.models.entries import Converted
from lowmem.models.files import LocalFolder, read_object
from lowmem.models.generation_config import generation_config
from lowmem.models.matching import by_module, match_names, tied_parameters
from lowmem.models.modules import empty_model, set_tensor
from lowmem.models.spec import CODE_DTYPES
from lowmem.planning.model_bytes import compute_dtype
from lowmem.planning.plan import Plan
from lowmem.planning.precision import available, storage_refusal
from lowmem.precisions import PRECISIONS
from lowmem.runtime.streaming.attach import as_stored, can_map, checked_layer, offloaded_names, stream
from lowmem.runtime.streaming.streamer import Streamer
from lowmem.units import MB

log = logging.getLogger("lowmem.loader")

TEMPLATE = "chat_template.json"
"""The chat template of models that also see or hear, in files of older versions."""

TRIM_BYTES = 8 * MB


@dataclass
class Loaded:
    """A model ready to generate, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    streamer: Streamer | None = None

    def close(self) -> None:
        """Close files and threads; the model's memory is freed with the object."""
        if self.streamer is not None:
            self.streamer.close()


def load(plan: Plan, folder: Path, cancel: CancelToken) -> Generator[Step, None, Loaded]:
    """Load `folder` as `plan` says; the generator yields progress and returns a `Loaded`.

    At the first step the family's code is imported and the empty model is built: memory taken after that is the model's, and
    is freed with it.

    Raises:
        CorruptModel, Unsupported: the folder does not hold what the plan expects.
        Cancelled: between two tensors.
    """
    if refusal := storage_refusal(plan.spec) or available(plan.precision, plan.hardware, plan.device, plan.spec):
        raise Unsupported(refusal, msg("Let the planner choose the precision, or choose the original model."))
    device = torch.device(plan.device)
    dtype = TORCH_DTYPES[compute_dtype(plan.precision, plan.place.dtypes)]
    model = _empty_model(folder, dtype)
    yield Step(0, 0, msg("Building the empty model"))
    tokenizer = _tokenizer(folder)
    with Checkpoint(folder) as checkpoint:
        place = _Placer(plan, device, dtype)
        names = match_names(model, checkpoint)
        offloaded = offloaded_names(model, names, plan.placement, device) if plan.placement else {}
        streamed = {name for block in offloaded.values() for name in block}
        yield from _fill(model, checkpoint, {n: names[n] for n in names if n not in streamed}, place, cancel)
        streamer = _stream(model, checkpoint, offloaded, plan, device, dtype)
    _settle(model, device)
    if device.type == "cpu" and dtype == torch.bfloat16:
        _avoid_copying_head(model)
    _guard_vocabulary(model, tokenizer)
    return Loaded(model, tokenizer, device, dtype, streamer)


def _stream(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    offloaded: dict[int, Any],
    plan: Plan,
    device: torch.device,
    dtype: torch.dtype,
) -> Streamer | None:
    if not offloaded or plan.placement is None:
        return None
    if plan.placement.mapped and not can_map(checkpoint, offloaded, dtype):
        raise Unsupported(
            msg("Weights that are stored in another dtype cannot be used in place."), msg("Stream them instead.")
        )
    return stream(model, checkpoint, offloaded, plan.placement, device, dtype, plan.spec.stored)


def _empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    model = empty_model(folder, dtype)
    if (config := generation_config(folder)) is not None:
        model.generation_config = config
    return model


def _tokenizer(folder: Path) -> Any:
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("cannot read the tokenizer of %s", folder, exc_info=True)
        raise CorruptModel(
            msg("The tokenizer in {folder} cannot be read: {error}", folder=folder.name, error=first_line(error)),
            msg("Fetch the model again, or add its tokenizer.json."),
        ) from error
    if not tokenizer.chat_template and (folder / TEMPLATE).is_file():  # which transformers reads for a processor only
        with suppress(CorruptModel):
            template = read_object(LocalFolder(folder), TEMPLATE).get("chat_template")
            tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def _fill(
    model: PreTrainedModel, checkpoint: Checkpoint, stored: dict[str, str], place: _Placer, cancel: CancelToken
) -> Iterator[Step]:
    total = sum(checkpoint.tensors[name].nbytes for name in stored.values())
    done = trimmed = 0
    for owner, members in by_module(stored).items():
        cancel.check()
        module = model.get_submodule(owner)
        tensors = {member: checkpoint.tensors[name] for member, name in members.items()}
        replacement = place(owner, module, checkpoint, members)
        if replacement is not module:
            model.set_submodule(owner, replacement)
        done += sum(entry.nbytes for entry in tensors.values())
        if done - trimmed >= TRIM_BYTES:
            # Temporaries of many sizes between weights that stay fragment the heap; the holes grow as large as the weights.
            trim_heap()
            trimmed = done
        yield Step(done, total, msg("Loading weights"), "B")


class _Placer:
    """Fills one module from the checkpoint, or makes its quantized replacement."""

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype) -> None:
        self.stored, self.device, self.dtype = plan.spec.stored, device, dtype
        # Next to streamed blocks, resident weights stay in their stored dtype too.
        self.as_stored = plan.placement is not None and device.type == "cpu"
        computed = compute_dtype(plan.precision, plan.place.dtypes)
        self.precision = PRECISIONS[plan.precision].dense(computed, self.stored)
        self._roles = {tensor.name: tensor.role for tensor in plan.spec.tensors}

    def __call__(self, owner: str, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str]) -> nn.Module:
        if "qweight" in members or ("weight" in members and checkpoint.tensors[members["weight"]].dtype in CODE_DTYPES):
            return self._packed(module, checkpoint, members)
        if "weight" in members and (table := packed_rows(checkpoint.tensors[members["weight"]])):
            return self._table(module, checkpoint, members, table.bits)
        if self.as_stored:
            return self._as_stored(module, checkpoint, members)
        role = self._roles.get(f"{owner}.weight", "")
        if role == "embedding" and self.precision.covers_embeddings:
            return self._embedding(module, checkpoint, members)
        covered = role in ("linear", "experts") or (role == "head" and self.precision.covers_embeddings)
        if covered and isinstance(module, (nn.Linear, Conv1D)) and self.precision.quantizes(_shape(module)[1]):
            return self._quantized(module, checkpoint, members)
        for member, name in members.items():
            stacked = self._roles.get(f"{owner}.{member}") == "experts" and len(checkpoint.tensors[name].shape) == 3
            if stacked and self.precision.quantizes(_inputs(module, checkpoint.tensors[name].shape)):
                del module._parameters[member]
                module.add_module(member, nn.ModuleList(self._experts(module, checkpoint, name)))
            else:
                set_tensor(module, member, self._read(module, member, checkpoint, name))
        return module

    def _experts(self, module: nn.Module, checkpoint: Checkpoint, name: str) -> Iterator[nn.Module]:
        """A quantized layer for every expert of a stacked projection, read one at a time where they lie apart."""
        entry = checkpoint.tensors[name]
        whole = checkpoint.read_entry(entry) if isinstance(entry, Converted) and not entry.steps else None
        for expert in range(entry.shape[0]):
            rows = entry.rows(expert, expert + 1)
            weight = whole[expert] if whole is not None else checkpoint.read_entry(rows)[0]
            if module.is_transposed:
                weight = weight.t()
            yield self.precision.linear(weight, None, self.device, self.dtype)

    def _as_stored(self, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str]) -> nn.Module:
        runner = as_stored(module, checkpoint, members, self.dtype)
        for member, name in members.items():
            keeps = isinstance(runner, (StoredLinear, StoredEmbedding))
            set_tensor(runner, member, checkpoint.read(name, None if keeps else self.dtype))
        return runner

    def _quantized(self, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str]) -> nn.Module:
        weight = checkpoint.read(members["weight"])
        if isinstance(module, Conv1D):
            weight = weight.t()
        bias = checkpoint.read(members["bias"]) if "bias" in members else None
        return self.precision.linear(weight, bias, self.device, self.dtype)

    def _packed(self, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str]) -> nn.Module:
        layer = (members.get("qweight") or members["weight"]).rpartition(".")[0]
        stored, outputs, inputs = checked_layer(module, checkpoint, members, self.stored, layer)
        parts = {part: checkpoint.read(name) for part, name in members.items()}
        return packed_linear.stored_linear(stored, layer, parts, (outputs, inputs), self.device, self.dtype)

    def _embedding(self, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str]) -> nn.Module:
        entry: Any = checkpoint.tensors[members["weight"]]
        rows = self.precision.embedding(entry.shape, lambda start, stop: checkpoint.read_entry(entry.rows(start, stop)))
        return PackedEmbedding(rows, self.dtype, _factor(module))

    def _table(self, module: nn.Module, checkpoint: Checkpoint, members: dict[str, str], bits: int) -> nn.Module:
        """The embedding or output head of a table that is stored packed."""
        entry: Any = checkpoint.tensors[members["weight"]]
        codes, scales = (checkpoint.read_entry(source) for source in entry.sources)
        if not bool(scales.isfinite().all()):
            raise CorruptModel(
                msg("{name} contains NaN or infinite values.", name=f"{members['weight']}{SCALES}"),
                msg("Fetch the model again."),
            )
        rows = PackedRows(codes, scales, bits).to(self.device)
        if isinstance(module, nn.Embedding):
            return PackedEmbedding(rows, self.dtype, _factor(module))
        return PackedHead(rows, checkpoint.read(members["bias"]) if "bias" in members else None, self.dtype)

    def _read(self, module: nn.Module, member: str, checkpoint: Checkpoint, name: str) -> Tensor:
        shape = checkpoint.tensors[name].shape
        dtype = _dtype(module, member, self.dtype)
        if self._column_major(module, member):
            # Decoding multiplies one row by a matrix, which MKL does 1.2 to 1.6 times faster if the matrix is laid out
            # [in, out] in memory. The shape stays [out, in].
            tensor = torch.empty(tuple(reversed(shape)), dtype=self.dtype).t()
            return checkpoint.read_into(name, tensor)
        tensor = checkpoint.read_into(name, torch.empty(tuple(shape), dtype=dtype))
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def _column_major(self, module: nn.Module, member: str) -> bool:
        on_cpu = self.device.type == "cpu" and self.dtype == torch.float32
        return on_cpu and member == "weight" and isinstance(module, (nn.Linear, nn.Embedding))


def _dtype(module: nn.Module, member: str, computed: torch.dtype) -> torch.dtype:
    """`computed`, or the dtype that the family's code keeps this tensor in: fp32 for the biases of some routers."""
    empty = module._buffers.get(member, module._parameters.get(member))
    return computed if empty is None else empty.dtype


def _factor(embedding: nn.Module) -> float:
    """What Gemma and others multiply the rows of an embedding by."""
    return float(getattr(embedding, "embed_scale", 1.0))


def _inputs(module: Any, shape: tuple[int, ...]) -> int:
    """Inputs of each expert of a projection of this shape."""
    return shape[1] if module.is_transposed else shape[2]


def _shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return module.out_features, module.in_features


def _settle(model: PreTrainedModel, device: torch.device) -> None:
    """Tie weights, move buffers to the device, and check that every tensor was filled.

    Raises:
        CorruptModel: a tensor was not in the files.
    """
    for parameter, source in tied_parameters(model).items():
        _tie(model, parameter, source)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    empty = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if empty:
        raise CorruptModel(
            msg("{empty} weights are missing from the files, starting with {first}.", empty=len(empty), first=empty[0]),
            msg("Fetch the model again."),
        )


def _avoid_copying_head(model: PreTrainedModel) -> None:
    """Make the output head's input contiguous.

    transformers passes the last position as a slice, whose strides make torch's bf16 kernel copy the whole weight (57 MB for
    the demo model) in every prefill.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(
            lambda _, inputs: (inputs[0].new_empty(inputs[0].shape).copy_(inputs[0]), *inputs[1:])
        )


def _tie(model: PreTrainedModel, parameter: str, source: str) -> None:
    """Let `parameter` be the tensor `source`, in whatever form this was loaded."""
    owner = parameter.rpartition(".")[0]
    origin: Any = model.get_submodule(source.rpartition(".")[0])
    bias: Any = getattr(model.get_submodule(owner), "bias", None)
    if isinstance(origin, PackedEmbedding):
        model.set_submodule(owner, PackedHead(origin.rows, bias, origin.dtype))
    elif isinstance(origin, StoredEmbedding):
        model.set_submodule(owner, StoredLinear(origin.get_parameter("weight"), bias))
    elif type(origin) is type(model.get_submodule(owner)) or isinstance(origin, nn.Embedding):
        set_tensor(model, parameter, model.get_parameter(source))
    else:
        model.set_submodule(owner, origin)


def _guard_vocabulary(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let a text with tokens that the model does not know end in a sentence, where the tokenizer has such tokens.

    On a GPU an index beyond the embedding would end all further work of the process.
    """
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: check_ids(int(inputs[0].max()), size))


WARM_UP_TOKENS = 16
"""So many that a prompt's kernels are read from disk too, 12 MB of ONNX Runtime's, which a single token does not use."""


def warm_up(loaded: Loaded) -> None:
    """Run some tokens through the model, so that kernels and thread pools start now and not in the first generation."""
    ids = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.long, device=loaded.device)
    with torch.inference_mode():
        loaded.model(input_ids=ids, use_cache=False, logits_to_keep=1)
