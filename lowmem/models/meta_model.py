"""Derives a model's `Anatomy` by running its family's own code without weights, on torch's meta device.

There tensors have shapes and no memory, so a model of any size is built in a second, and a forward pass over thousands of
tokens takes milliseconds. What each layer caches is read off the cache after the pass; how much memory the pass takes is
what its tensors would hold together, followed operation by operation.
"""

from __future__ import annotations

import inspect
import json
import logging
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from lowmem.background import end_with_parent, limit_process
from lowmem.errors import CorruptModel, LowMemError, UnsafeModel, Unsupported, first_line, is_out_of_memory
from lowmem.messages import msg
from lowmem.models import modules
from lowmem.models.anatomy import Activations, Anatomy, LayerCache, Term, value
from lowmem.models.blocks import BlockList
from lowmem.models.cache_argument import cache_argument
from lowmem.models.dequantize import dequantize_entries, packed_rows
from lowmem.models.entries import Entry, Extent, Joined, Source
from lowmem.models.matching import match_names, tied_parameters
from lowmem.models.meta_blocks import derive_blocks
from lowmem.models.quantization import parse_quantization
from lowmem.models.tensors import DTYPE_BYTES, Tensor

log = logging.getLogger("lowmem.models")

FIRST = ((1, 1), (2, 2), (3, 3))
LATER = ((1, 3), (1, 5), (2, 5), (2, 10))
"""(new tokens, tokens they see) of the passes that are followed, in units of up to 256 tokens."""

MEMORY_BYTES, CPU_SECONDS = 2**30, 60
"""Limits of a derivation in a process of its own, beside what torch takes; the largest models take a tenth of them."""

UNBOUNDED = 131_072
"""The context of a model that has no limit of its own, such as one whose layers are all recurrent."""


def anatomy(config: Mapping[str, Any], name: str, stored: Iterable[Tensor] | None, dtype: str = "") -> Anatomy:
    """The anatomy of the model that a config.json describes.

    Args:
        name: of the model, for messages.
        stored: the tensors of its files; None for every parameter, stored in `dtype`.

    Raises:
        UnsafeModel, Unsupported: not a model that transformers runs as a causal language model or a text encoder.
        CorruptModel: configuration and files contradict each other, or examining them takes more memory than a model can.
    """
    try:
        return _anatomy(config, name, stored, dtype)
    except LowMemError:
        raise
    except Exception as error:  # of transformers or torch, from values that no model has
        if is_out_of_memory(error):
            raise CorruptModel(
                msg("config.json of {name} describes a model that cannot be built even without weights.", name=name),
                msg("Fetch the model again, or choose another."),
            ) from error
        log.info("cannot examine %s", name, exc_info=True)
        raise Unsupported(
            msg("The inside of {name} could not be examined: {error}", name=name, error=first_line(error)),
            msg("Choose another model."),
        ) from error


def _anatomy(config: Mapping[str, Any], name: str, stored: Iterable[Tensor] | None, dtype: str) -> Anatomy:
    parsed = read_config(config, name)
    encoder = _checked_encoder(parsed, name)
    try:
        model = _encoder(parsed) if encoder else modules.build(parsed)
        halves = _encoder(parsed, torch.bfloat16) if encoder else modules.build(parsed, torch.bfloat16)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise Unsupported(
            msg("transformers cannot build this model: {error}", error=first_line(error)),
            msg("Choose a causal language model of a known family."),
        ) from error
    experts = _experts(model)  # before those that are stored packed are taken out of their stacks
    if encoder:  # exported with whatever its files hold
        tensors = _held(model, halves, None, next((tensor.dtype for tensor in stored or ()), dtype or "fp32"), {})
    else:
        tensors = _held(model, halves, stored, dtype, config.get("quantization_config") or {})
    decoder = model.config.get_text_config(decoder=True)
    try:
        caches, passes, used = _passes(model, halves, encoder)
    except Exception as error:
        if is_out_of_memory(error) or type(parsed) in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise
        raise Unsupported(
            msg(
                "{name} ({model_type}) cannot read text alone: {error}",
                name=name,
                model_type=parsed.model_type,
                error=first_line(error),
            ),
            msg("Choose a text generation model, such as one from the list."),
        ) from error
    cached = any(cache.kind != "none" for cache in caches)
    # Where the family's code takes a weight out of its layer, no other layer can take that layer's place.
    tensors = tuple(
        t if t.name.rpartition(".")[0] in used or t.role == "experts" else replace(t, role="other") for t in tensors
    )

    def passed() -> object:
        return Pass(model, cached).run(8, 8)

    heads = _number(decoder, "num_attention_heads") or 1
    widths = [module.out_features for module in model.modules() if isinstance(module, nn.Linear)]
    return Anatomy(
        model_type=decoder.model_type,
        layers=int(decoder.num_hidden_layers),
        hidden=int(decoder.hidden_size),
        intermediate=_number(decoder, "intermediate_size") or max(widths, default=0),
        heads=heads,
        kv_heads=max((cache.heads for cache in caches), default=0) or heads,
        head_dim=max((cache.key_dim for cache in caches), default=0) or max(1, decoder.hidden_size // heads),
        vocab=int(decoder.vocab_size),
        context=context_limit(decoder),
        tied=bool(tied_parameters(model)),
        encoder=encoder,
        cached=cached,
        caches=caches,
        activations=passes,
        tensors=tensors,
        blocks=BlockList() if encoder else derive_blocks(model, _blocks(model).removesuffix("."), passed),
        experts=experts,
        experts_per_token=_experts_per_token(decoder) if experts else 0,
    )


def read_config(config: Mapping[str, Any], name: str) -> Any:
    """transformers' configuration of the text model in a config.json.

    Raises:
        UnsafeModel, Unsupported, CorruptModel: see `anatomy`.
    """
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        if config.get("auto_map"):
            raise UnsafeModel(
                msg(
                    "{name} needs Python code from its own repository to run (model_type {model_type!r}).",
                    name=name,
                    model_type=str(kind)[:80],
                ),
                msg("lowmem never runs downloaded code: choose a text generation model, such as one from the list."),
            )
        raise Unsupported(
            msg(
                "{name} has an architecture that transformers does not know (model_type {model_type!r}).",
                name=name,
                model_type=str(kind)[:80],
            ),
            msg("Choose a text generation model, such as one from the list."),
        )
    known = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(known), encoding="utf-8")
            return modules.text_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CorruptModel(
            msg("config.json of {name} cannot be read: {error}", name=name, error=_reason(error)),
            msg("Fetch the model again."),
        ) from error


def _reason(error: Exception) -> str:
    """The first two lines: transformers names the field in the first and what is wrong with it in the second."""
    return " ".join(str(error).split("\n")[:2])[:200] or type(error).__name__


def is_encoder(config: Any) -> bool:
    """Whether a configuration is that of a text encoder."""
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _checked_encoder(config: Any, name: str) -> bool:
    """Whether this is a text encoder; refuses what neither reads nor writes text.

    Raises:
        Unsupported: neither a causal language model nor an encoder of text.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            msg(
                "{name} is an encoder-decoder ({model_type}), not a causal language model.",
                name=name,
                model_type=config.model_type,
            ),
            msg("Choose a text generation model, such as one from the list."),
        )
    if is_encoder(config):
        return True
    if not modules.writes_text(config):
        raise Unsupported(
            msg("{name} ({model_type}) does not generate text.", name=name, model_type=config.model_type),
            msg("Choose a text generation model, such as one from the list."),
        )
    return False


def _encoder(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return max(map(int, value)) if isinstance(value, (list, tuple)) else int(value or 0)


def context_limit(decoder: Any) -> int:
    """The model's context length in tokens, whatever its family calls it."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "n_ctx")
    return next((int(value) for name in names if (value := getattr(decoder, name, None))), UNBOUNDED)


def _experts(model: PreTrainedModel) -> int:
    counts = (parameter.shape[0] for _, parameter, role, _ in roles(model) if role == "experts")
    return max(counts, default=0)


def _experts_per_token(decoder: Any) -> int:
    """How many experts a token is sent to, whatever its family calls it."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")
    return next((count for name in names if (count := _number(decoder, name))), 0)


def roles(model: PreTrainedModel) -> list[tuple[str, torch.Tensor, str, bool]]:
    """(name, tensor, role, whether it is a transposed matrix) of everything that a checkpoint of `model` must hold."""
    blocks = _blocks(model)
    found = []
    kept = model.state_dict().keys()
    for owner, module in model.named_modules():
        prefix = f"{owner}." if owner else ""
        inside = owner.startswith(blocks)
        for member, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or prefix + member not in kept:
                continue
            role, transposed = "other", False
            if member == "weight" and tensor.dim() == 2 and is_linear(module):
                role, transposed = "linear" if inside else "head", isinstance(module, Conv1D)
            elif is_table(module) and member == "weight":
                role = "embedding"
            elif tensor.dim() == 3 and hasattr(module, "is_transposed"):
                role, transposed = "experts", module.is_transposed
            found.append((prefix + member, tensor, role, transposed))
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and does nothing else: some routers are linear layers that also choose."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def is_table(module: nn.Module) -> bool:
    """Whether a module maps ids to rows, times a factor, and does nothing else: some position embeddings shift their ids."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"))


def _blocks(model: PreTrainedModel) -> str:
    """The name of the list of decoder blocks, with a dot behind."""
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return next((f"{name}." for name, module in lists if len(module) == layers), "-")


def _held(
    model: PreTrainedModel,
    halves: PreTrainedModel,
    stored: Iterable[Tensor] | None,
    dtype: str,
    described: Mapping[str, Any],
) -> tuple[Tensor, ...]:
    known = {name: (role, transposed) for name, _, role, transposed in roles(model)}
    wide = {name for name, tensor, _, _ in roles(halves) if tensor.dtype == torch.float32}
    shapes = {name: tuple(tensor.shape) for name, tensor, _, _ in roles(model)}
    tied = tied_parameters(model)
    if stored is None:
        buffers = {name for name, _ in model.named_buffers()}
        return tuple(
            Tensor(name, dtype, shape, _bytes(shape, dtype), *known[name], wide=name in wide)
            for name, shape in shapes.items()
            if name not in tied and name not in buffers
        )
    entries: dict[str, Source] = {t.name: Entry(t.dtype, t.shape, (Extent(Path(), 0, t.nbytes),)) for t in stored}
    dequantize_entries(entries, described)
    inventory = SimpleNamespace(tensors=entries)
    names: dict[str, str] = match_names(model, inventory)
    whole = parse_quantization(described) if described else None
    found = []
    for name, source in names.items():
        entry = entries[source]
        shape = tuple(entry.shape)
        role, transposed = known.get(name) or (_packed_role(name, known) if len(shape) == 2 else "other", False)
        tensor = Tensor(name, entry.dtype, shape, entry.nbytes, role, transposed, wide=name in wide)
        if tensor.is_packed_weight and whole is not None and (layer := whole.of(source.rpartition(".")[0])) != whole:
            tensor = replace(tensor, packing=(layer.bits, layer.group_size))
        elif table := packed_rows(entry):
            tensor = replace(tensor, packing=(table.bits, table.block[1]))
        found.append(replace(tensor, parts=_parts(entry)) if role == "experts" else tensor)
    return tuple(found)


def _packed_role(name: str, known: Mapping[str, tuple[str, bool]]) -> str:
    """The role of a tensor that is no parameter of the model: a part of a packed layer, perhaps of one expert."""
    while name:
        name = name.rpartition(".")[0]
        if name in known:
            return known[name][0]
    return "other"


def _parts(entry: Source) -> int:
    """Stored tensors that each expert of a projection is made of; 1 where the experts are stored as one tensor."""
    pieces = entry.extents if isinstance(entry, Entry) else entry.parts if isinstance(entry, Joined) else ()
    return max(1, len(pieces) // entry.shape[0])


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(torch.Size(shape).numel()) * DTYPE_BYTES[dtype]


def _passes(
    model: PreTrainedModel, halves: PreTrainedModel, encoder: bool
) -> tuple[tuple[LayerCache, ...], tuple[tuple[str, Activations], ...], set[str]]:
    """What the layers cache, what forward passes take in fp32 and in half precision, and the modules that they call."""
    decoder = model.config.get_text_config(decoder=True)
    layers = int(decoder.num_hidden_layers)
    caches: tuple[LayerCache, ...] = ()
    for one in (model, halves):
        nn.Module.to(one, "meta")  # buffers too
        with suppress(Exception):  # refused where a family's configuration must name a token
            one.config.pad_token_id = None  # or some families look for padding in the ids
    with _calls(halves) as called:
        if not encoder and cache_argument(model):
            # A cache of the family's own, or states that are no layers of one, show as an error.
            with suppress(Exception):
                caches = tuple(map(_layer_cache, Pass(halves).run(32, 32).layers))
        if not caches:
            Pass(halves, cached=False).run(8, 8)
    found = []
    for name, one in (("fp32", model), ("half", halves)):
        with shallow(one, caches):
            followed = Pass(one, cached=bool(caches))
            # Layers that loop over the tokens make every pass longer: theirs are short.
            looping = len(followed.live(8, 8)) != len(followed.live(16, 16))
            unit = min(8 if looping else 256, max(1, context_limit(decoder) // 10))
            first = terms([(probe, followed.live(*probe)) for probe in probes(FIRST, unit)])
            later = terms([(probe, followed.live(*probe)) for probe in probes(LATER, unit)]) if caches else first
        found.append((name, Activations(first, later)))
    return caches or (LayerCache(),) * layers, tuple(found), called


@contextmanager
def _calls(model: PreTrainedModel) -> Iterator[set[str]]:
    """The names of the layers that compute meanwhile. Not by hooks: some families run the hooks of layers they do not call."""
    called: set[str] = set()
    layers = [(name, module) for name, module in model.named_modules() if not any(module.children())]

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return forward(*args, **kwargs)

        return noted

    for name, layer in layers:
        layer.forward = noting(name, layer.forward)
    try:
        yield called
    finally:
        for _, layer in layers:
            del layer.forward


def probes(shares: Sequence[tuple[int, int]], unit: int) -> list[tuple[int, int]]:
    return [(tokens * unit, context * unit) for tokens, context in shares]


def _layer_cache(layer: Any) -> LayerCache:
    """What a layer of a model in half precision caches; `layer` has seen one sequence."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    found = LayerCache()
    if keys is not None and values is not None and keys.dim() == 4:
        window = int(getattr(layer, "sliding_window", 0) or 0)
        found = LayerCache(keys.shape[1], keys.shape[-1], values.shape[-1], window)
    index = getattr(layer, "indexer_keys", None)
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    return replace(
        found,
        index=0 if index is None else index.shape[-1],
        state=sum(state.numel() for state in states if state is not None and state.dtype == torch.bfloat16),
        state_bytes=sum(state.nbytes for state in states if state is not None and state.dtype != torch.bfloat16),
    )


@contextmanager
def shallow(model: PreTrainedModel, caches: Sequence[LayerCache]) -> Iterator[None]:
    """Keep the first blocks only, up to the last that differs from all before: the memory of a pass is the same."""
    name = _blocks(model).removesuffix(".")
    blocks: Any = dict(model.named_modules()).get(name)
    if blocks is None or len(blocks) != len(caches):
        yield
        return
    kinds = [
        (cache, tuple((name, parameter.shape) for name, parameter in block.named_parameters()))
        for block, cache in zip(blocks, caches, strict=True)
    ]
    count = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))
    parent, _, member = name.rpartition(".")
    setattr(model.get_submodule(parent), member, blocks[:count])
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), member, blocks)


class Pass:
    """Forward passes of a model without weights, over one sequence."""

    def __init__(self, model: PreTrainedModel, cached: bool = True) -> None:
        self._model, self._cached = model, cached
        accepted = inspect.signature(model.forward).parameters
        self._more = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def run(self, tokens: int, context: int, mode: AbstractContextManager[Any] | None = None) -> Any:
        """The cache after a pass over `tokens`, the last of `context`; `mode` is active while it runs."""
        inputs: dict[str, Any] = dict(self._more)
        cache = None
        if self._cached:
            cache = DynamicCache(config=self._model.config)
            for layer in cache.layers:
                _unseen(layer)
            inputs |= {"use_cache": True, cache_argument(self._model): cache}
        with torch.inference_mode():
            if context > tokens:
                with _Assumed():
                    self._model(input_ids=_ids(context - tokens), **inputs)
            ids = _ids(tokens)
            with mode or nullcontext(), _Assumed():
                self._model(input_ids=ids, **inputs)
        return cache

    def live(self, tokens: int, context: int) -> list[int]:
        """Bytes alive after each operation of a pass, without the cache."""
        mode = _Live()
        self.run(tokens, context, mode)
        return mode.history


def _ids(count: int) -> torch.Tensor:
    return torch.zeros(1, count, dtype=torch.long, device="meta")


def _unseen(layer: Any) -> None:
    """Do not count what a layer with every token allocates: the caches that run have room for all tokens beforehand."""
    if getattr(type(layer), "update", None) is not DynamicLayer.update:
        return
    for name in ("update", "update_indexer"):
        if hasattr(layer, name):
            setattr(layer, name, _uncounted(getattr(layer, name)))


def _uncounted(update: Callable[..., Any]) -> Callable[..., Any]:
    def quietly(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return update(*args, **kwargs)

    return quietly


class _Assumed(TorchFunctionMode):
    """Answers what a family's code asks of values that are not there.

    Where the code loops over the experts that were chosen, all tokens choose the first. Any condition holds: what it asks
    of masks is whether they hide nothing.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        chosen: torch.Tensor | None = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if chosen is not None and chosen.is_meta and len(args) == 1 and not kwargs:
            if func is torch.Tensor.__bool__:
                return True
            if func in (torch.nonzero, torch.Tensor.nonzero):
                return torch.zeros(1, chosen.dim(), dtype=torch.long)
            if func is torch.where:
                return tuple(chosen.new_empty(chosen.shape[-1], dtype=torch.long) for _ in chosen.shape)
        return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """Follows the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[int] = []
        self._sizes: dict[int, int] = {}
        self._alive = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # What a result shares with an argument is older: a view of a parameter, such as one of many experts, takes nothing.
        older = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in older:
                self._add(tensor.untyped_storage())
        self.history.append(self._alive)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._alive += self._sizes[key]
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self._alive -= self._sizes.pop(key)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def terms(runs: Sequence[tuple[tuple[int, int], list[int]]]) -> tuple[Term, ...]:
    """The terms of `Activations` that follow from what was alive in several passes."""
    probes = [probe for probe, _ in runs]
    histories = [history for _, history in runs]
    if len({len(history) for history in histories}) > 1:  # loops over the tokens: only the peaks correspond
        histories = [[max(history)] for history in histories]
    first = all(tokens == context for tokens, context in probes)
    system = [[t, t * c, 1.0] if first else [t, t * c, c, 1.0] for t, c in probes]
    solved = torch.linalg.solve(
        torch.tensor(system, dtype=torch.float64), torch.tensor(histories, dtype=torch.float64)
    ).T.tolist()
    found = {_rounded((a, b, 0.0, rest[0]) if first else (a, b, *rest)) for a, b, *rest in solved}
    largest = {
        max(found, key=lambda term: value(term, tokens, tokens if first else context))
        for tokens in (1, 64, 256, 1024, 4096, 16_384)
        for context in (tokens, 1024, 8192, 32_768, 131_072)
        if context >= tokens
    }
    return tuple(sorted(largest))


def _rounded(term: Sequence[float]) -> Term:
    a, b, c, d = term
    return round(a, 1), round(b, 2), round(c, 1), round(d)


def main() -> None:
    """The anatomy, or the error, of what standard input describes, both pickled; for `derive.py`."""
    end_with_parent()
    torch.set_num_threads(1)
    limit_process(MEMORY_BYTES, CPU_SECONDS)
    arguments = pickle.load(sys.stdin.buffer)
    try:
        with redirect_stdout(sys.stderr):
            result: Any = anatomy(*arguments)
    except LowMemError as error:
        result = error
    sys.stdout.buffer.write(pickle.dumps(result))


if __name__ == "__main__":
    main()
