"""An exported model behind the decode loop: it takes the place of transformers' model there.

A fused graph keeps its cache in place: one buffer per layer is past and present at once, and no byte of it is
copied. Its rows begin at the left, whatever padding the caller's text has, so a prompt is read row by row and nobody
computes padding. A prompt is read without its logits, by a graph of its own where there is one; only the last token of
every row goes through the output head. A generic graph returns its cache anew in every step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowmem.errors import CorruptModel, LowMemError, MissingDependency, OutOfMemory, Unsupported
from lowmem.export.manifest import GRAPH, KEEP, PREFILL, Manifest, read_manifest
from lowmem.machine.processor import cores, has_vnni

log = logging.getLogger("lowmem.onnx")

FIRST_PIECE, PIECE_SECONDS = 256, 0.5
"""Prompt tokens of the first pass; later ones are as long as half a second takes, so that Stop is heard."""

_VNNI_RANGE = 127
_AGAIN = "Export the model again."


def open_session(path: Path, *, threads: int = 0, saturates: bool = False, providers: Sequence[Any] = ()) -> Any:
    """An inference session of the graph in `path`.

    Args:
        threads: of one operator; 0 is one for each core that this process may use.
        saturates: the graph's 8-bit weights would overflow AVX2's 16-bit sums.

    Raises:
        MissingDependency, CorruptModel, Unsupported, OutOfMemory: one sentence each.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingDependency("onnxruntime, which runs exported models, is not installed.", "pip install onnxruntime")  # noqa: B904
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or cores(), 1
    options.log_severity_level = 3
    # Initializers beside the arena, which grows in powers of two and never shrinks.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if saturates:
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        session = ort.InferenceSession(path, options, providers=list(providers) or ["CPUExecutionProvider"])
    except Exception as error:
        raise _session_error(path, error) from error
    session.disable_fallback()
    return session


def _session_error(path: Path, error: Exception) -> LowMemError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    lower = text.lower()
    log.info("cannot open %s", path, exc_info=True)
    if "opset" in lower:
        return Unsupported(f"{path.name} needs a later ONNX Runtime: {text}", "pip install -U onnxruntime")
    if "not implemented" in lower or "is not a registered function/op" in lower:
        return Unsupported(f"ONNX Runtime here lacks an operator of {path.name}: {text}", "pip install -U onnxruntime")
    if "alloc" in lower or "memory" in lower:
        return OutOfMemory(f"Memory ran out while loading {path.name}.", "Choose fewer bits or a smaller model.")
    return CorruptModel(f"{path.name} cannot be loaded: {text}", _AGAIN)


class OnnxModel:
    """Looks to the decode loop like a causal model of transformers: `config`, `device`, `forward`, `modules`.

    Raises:
        CorruptModel, Unsupported, MissingDependency, OutOfMemory: on opening.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    own_threads = True

    def __init__(self, folder: Path, *, threads: int = 0, providers: Sequence[Any] = ()) -> None:
        from transformers import AutoConfig, GenerationConfig

        self.manifest: Manifest = read_manifest(folder)
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.generation_config = None
        if (folder / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        saturates = self.manifest.int8_range == _VNNI_RANGE and not has_vnni()
        arguments: dict[str, Any] = {"threads": threads, "providers": providers, "saturates": saturates}
        self.session = open_session(folder / GRAPH, **arguments)
        inputs = [value.name for value in self.session.get_inputs()]
        self.past = [name for name in inputs if name.startswith("past_key_values.")]
        if not self.past:
            raise Unsupported(
                f"The graph in {folder.name} has no KV cache, so it cannot write text.",
                "Export a text generation model.",
            )
        shape = self.session.get_inputs()[inputs.index(self.past[0])].shape
        self.kv_heads, self.head_dim = int(shape[1]), int(shape[3])
        self.keeps_logits = KEEP in [value.name for value in self.session.get_overridable_initializers()]
        self.has_positions = "position_ids" in inputs
        self.cache_type = {"tensor(float16)": np.float16}.get(
            self.session.get_inputs()[inputs.index(self.past[0])].type, np.float32
        )
        self.in_place = self.manifest.kind == "fused"
        self.prefill = open_session(folder / PREFILL, **arguments) if PREFILL in self.manifest.files else None
        self._hooks: list[Callable[[Any, tuple[object, ...]], None]] = []

    @property
    def base_model(self) -> OnnxModel:
        """The decoder is not apart from the head."""
        return self

    def modules(self) -> Iterator[OnnxModel]:
        yield self

    def register_forward_pre_hook(self, hook: Callable[[Any, tuple[object, ...]], None]) -> Any:
        """`hook` is called before every run of a graph, and may raise."""
        self._hooks.append(hook)
        return SimpleNamespace(remove=lambda: self._hooks.remove(hook))

    def make_cache(self, rows: int, capacity: int) -> InPlaceCache | GrowingCache:
        """An empty cache for at most `rows` sequences of `capacity` tokens."""
        return InPlaceCache(self, rows, capacity) if self.in_place else GrowingCache(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: InPlaceCache | GrowingCache | None = None,
        use_cache: bool | None = None,  # noqa: ARG002  part of the interface
        logits_to_keep: int = 0,
    ) -> SimpleNamespace:
        """`logits` float32 [rows, tokens, vocabulary]; of the last token alone where `logits_to_keep` is 1."""
        rows, tokens = input_ids.shape
        cache = past_key_values if past_key_values is not None else self.make_cache(rows, tokens)
        ids = input_ids.numpy()
        mask = None if attention_mask is None else attention_mask.numpy()
        if isinstance(cache, InPlaceCache):
            logits = cache.extend(ids, mask, keep_all=logits_to_keep != 1)
        else:
            logits = cache.extend(ids, mask, None if position_ids is None else position_ids.numpy())
        return SimpleNamespace(logits=torch.from_numpy(logits))

    __call__ = forward

    def run(self, session: Any, binding: _Binding) -> None:
        """One run of a graph, preceded by the hooks.

        Raises:
            OutOfMemory: ONNX Runtime could not allocate.
        """
        for hook in self._hooks:
            hook(self, ())
        try:
            session.run_with_iobinding(binding.io)
        except Exception as error:
            if "alloc" in str(error).lower():
                raise OutOfMemory(
                    "Memory ran out in ONNX Runtime.", "Shorten the prompt, or load fewer bits."
                ) from error
            raise


class InPlaceCache:
    """Keys and values [rows, heads, capacity, head_dim] of every layer; row r holds `lengths[r]` tokens from the left.

    Pages that were never written cost no memory.
    """

    def __init__(self, model: OnnxModel, rows: int, capacity: int) -> None:
        self._model = model
        shape = (rows, model.kv_heads, capacity, model.head_dim)
        self._stores = {name: np.zeros(shape, model.cache_type) for name in model.past}
        self.lengths = np.zeros(0, np.int64)
        self._seconds_per_token = 0.0
        self._bound: tuple[int, _Binding, dict[str, np.ndarray]] | None = None

    def extend(self, ids: np.ndarray, mask: np.ndarray | None, keep_all: bool) -> np.ndarray:
        """Append `ids` [rows, tokens], those that `mask` [rows, all] hides left out; logits [rows, tokens or 1, vocab]."""
        rows, tokens = ids.shape
        if not len(self.lengths):
            self.lengths = np.zeros(rows, np.int64)
        real = np.full(rows, tokens) if mask is None else mask[:, -tokens:].sum(1)
        if keep_all:
            return np.concatenate([self._with_logits(row, ids[row, tokens - real[row] :]) for row in range(rows)])
        for row in range(rows):
            self._read(row, ids[row, tokens - real[row] : -1])
        if real.all():
            return self._step(ids[:, -1:])
        # A row whose text begins in a later chunk has nothing to predict from yet.
        logits = np.zeros((rows, 1, self._model.config.get_text_config().vocab_size), np.float32)
        for row in np.flatnonzero(real).tolist():
            logits[row] = self._with_logits(row, ids[row, -1:])[0]
        return logits

    def reset(self) -> None:
        """Forget all tokens; the rows stay."""
        self.lengths[:] = 0

    def crop(self, max_length: int) -> None:
        """Forget the tokens after the first `max_length` of every row."""
        np.minimum(self.lengths, max_length, out=self.lengths)

    def batch_repeat_interleave(self, copies: int) -> None:
        self._take(np.repeat(np.arange(len(self.lengths)), copies))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices.numpy())

    def _take(self, rows: np.ndarray) -> None:
        longest = int(self.lengths.max(initial=0))
        for store in self._stores.values():
            store[: len(rows), :, :longest] = store[rows, :, :longest]
        self.lengths = self.lengths[rows]
        self._bound = None

    def _read(self, row: int, ids: np.ndarray) -> None:
        """Fill the cache of a row; its logits are not fetched, and but for one token not computed."""
        session = self._model.prefill or self._model.session
        done = 0
        while done < len(ids):
            piece: int = FIRST_PIECE if not self._seconds_per_token else int(PIECE_SECONDS / self._seconds_per_token)
            part = ids[done : done + max(16, piece)]
            started = time.perf_counter()
            binding = self._binding(session, slice(row, row + 1), part[None])
            if session is self._model.session and self._model.keeps_logits:
                binding.input(KEEP, np.ones(1, np.int64))
            self._model.run(session, binding)
            self._seconds_per_token = (time.perf_counter() - started) / len(part)
            self.lengths[row] += len(part)
            done += len(part)

    def _with_logits(self, row: int, ids: np.ndarray) -> np.ndarray:
        session = self._model.session
        binding = self._binding(session, slice(row, row + 1), ids[None])
        binding.io.bind_output("logits")
        self._model.run(session, binding)
        self.lengths[row] += len(ids)
        return binding.io.get_outputs()[-1].numpy()

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """One token for every row, in one run; all that does not change between steps stays bound."""
        rows, session = len(ids), self._model.session
        if self._bound is None or self._bound[0] != rows:
            vocabulary = self._model.config.get_text_config().vocab_size
            held = {"input_ids": ids.copy(), "logits": np.empty((rows, 1, vocabulary), np.float32)}
            binding = self._binding(session, slice(0, rows), held["input_ids"])
            binding.output("logits", held["logits"])
            self._bound = rows, binding, held
        _, binding, held = self._bound
        held["input_ids"][:] = ids
        self._bind_place(binding, slice(0, rows), 1)
        self._model.run(session, binding)
        self.lengths += 1
        return held["logits"].copy()

    def _binding(self, session: Any, rows: slice, ids: np.ndarray) -> _Binding:
        binding = _Binding(session)
        for name, store in self._stores.items():
            value = _shared(store[rows])
            binding.input(name, value)
            binding.output(name.replace("past_key_values", "present"), value)
        binding.input("input_ids", ids)
        self._bind_place(binding, rows, ids.shape[1])
        return binding

    def _bind_place(self, binding: _Binding, rows: slice, tokens: int) -> None:
        """Where the new tokens stand: the mask of all, and their positions."""
        past = self.lengths[rows]
        everything = int(past.max()) + tokens
        mask = (np.arange(everything) < (past + tokens)[:, None]).astype(np.int64)
        binding.input("attention_mask", mask)
        binding.input("position_ids", past[:, None] + np.arange(tokens))


class GrowingCache:
    """The outputs `present.*` of one run, which are the inputs `past_key_values.*` of the next."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._values: dict[str, Any] = {}
        self.length = 0

    def extend(self, ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None) -> np.ndarray:
        """Append `ids` [rows, tokens]; logits [rows, tokens, vocabulary]. `mask` and `positions` as transformers has them."""
        model, (rows, tokens) = self._model, ids.shape
        everything = self.length + tokens
        mask = np.ones((rows, everything), np.int64) if mask is None else mask
        positions = np.arange(self.length, everything)[None].repeat(rows, 0) if positions is None else positions
        binding = _Binding(model.session)
        feeds = {"input_ids": ids, "attention_mask": mask} | (
            {"position_ids": positions} if model.has_positions else {}
        )
        for name, array in feeds.items():
            binding.input(name, array)
        empty = np.empty((rows, model.kv_heads, 0, model.head_dim), model.cache_type)
        for name in model.past:
            binding.input(name, self._values.get(name, empty))
        names = ["logits", *(name.replace("past_key_values", "present") for name in model.past)]
        for name in names:
            binding.io.bind_output(name)
        model.run(model.session, binding)
        logits, *present = binding.io.get_outputs()
        self._values = dict(zip(model.past, present, strict=True))
        self.length = everything
        return logits.numpy()

    def reset(self) -> None:
        """Forget all tokens."""
        self._values, self.length = {}, 0

    def batch_repeat_interleave(self, copies: int) -> None:
        self._values = {name: _shared(value.numpy().repeat(copies, 0)) for name, value in self._values.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.numpy()
        self._values = {name: _shared(value.numpy()[rows]) for name, value in self._values.items()}


class _Binding:
    """An IO binding that keeps the arrays alive whose memory ONNX Runtime reads and writes."""

    def __init__(self, session: Any) -> None:
        self.io = session.io_binding()
        self._kept: dict[str, Any] = {}

    def input(self, name: str, value: Any) -> None:
        self._kept[name] = value = _shared(value)
        self.io.bind_ortvalue_input(name, value)

    def output(self, name: str, value: Any) -> None:
        self._kept[name] = value = _shared(value)
        self.io.bind_ortvalue_output(name, value)


def _shared(value: Any) -> Any:
    """The memory of an array as ONNX Runtime sees it, not a copy."""
    import onnxruntime as ort

    if not isinstance(value, np.ndarray):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
