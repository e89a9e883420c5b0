"""KV caches of exported graphs: updated in place, with one buffer as past and present, or returned as new outputs.

The rows of a fused graph are aligned to the left, so a padded batch is prefilled row by row and no padding is computed. A
prompt is prefilled without logits, by a separate graph if there is one; only the last token of every row goes through the
output head.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor

from lowmem.runtime.onnx.manifest import KEEP


class Graph(Protocol):
    """The part of `OnnxModel` that a cache uses."""

    config: Any
    session: Any
    prefill: Any
    past: dict[str, tuple[int, int]]
    """Heads and their size, of the keys or values of a layer."""

    cache_type: Any
    keeps_logits: bool
    has_positions: bool
    piece: int

    def run(self, session: Any, binding: Binding, *, last: bool = False) -> None:
        """Call the hooks, then run a graph once."""


class InPlaceCache:
    """Keys and values [rows, heads, capacity, head_dim] of every layer; row r holds `lengths[r]` tokens from the left.

    Pages that were never written take no memory.
    """

    def __init__(self, model: Graph, rows: int, capacity: int) -> None:
        self._model = model
        self._stores = {
            name: np.zeros((rows, heads, capacity, width), model.cache_type)
            for name, (heads, width) in model.past.items()
        }
        self.lengths = np.zeros(0, np.int64)
        self._bound: tuple[int, Binding, dict[str, np.ndarray]] | None = None

    def extend(self, ids: np.ndarray, mask: np.ndarray | None, keep_all: bool) -> np.ndarray:
        """Append the tokens `ids` [rows, tokens] that are not masked by `mask` [rows, all]; logits [rows, tokens or 1, vocab]."""
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
        # A row whose text starts in a later chunk has no logits yet.
        logits = np.zeros((rows, 1, self._model.config.get_text_config().vocab_size), np.float32)
        for row in np.flatnonzero(real).tolist():
            logits[row] = self._with_logits(row, ids[row, -1:])[0]
        return logits

    def reset(self) -> None:
        """Drop all tokens but keep the rows."""
        self.lengths[:] = 0

    def crop(self, max_length: int) -> None:
        """Drop the tokens after the first `max_length` of every row."""
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
        """Prefill a row without its logits."""
        session = self._model.prefill or self._model.session
        done = 0
        while done < len(ids):
            part = ids[done : done + self._model.piece]
            binding = self._binding(session, slice(row, row + 1), part[None])
            if session is self._model.session and self._model.keeps_logits:
                binding.input(KEEP, np.ones(1, np.int64))
            done += len(part)
            self._model.run(session, binding, last=done == len(ids))
            self.lengths[row] += len(part)

    def _with_logits(self, row: int, ids: np.ndarray) -> np.ndarray:
        session = self._model.session
        binding = self._binding(session, slice(row, row + 1), ids[None])
        binding.io.bind_output("logits")
        self._model.run(session, binding, last=True)
        self.lengths[row] += len(ids)
        return binding.io.get_outputs()[-1].numpy()

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """Decode one token of every row in one run; inputs and outputs that do not change stay bound."""
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

    def _binding(self, session: Any, rows: slice, ids: np.ndarray) -> Binding:
        binding = Binding(session)
        for name, store in self._stores.items():
            value = _shared(store[rows])
            binding.input(name, value)
            binding.output(name.replace("past_key_values", "present"), value)
        binding.input("input_ids", ids)
        self._bind_place(binding, rows, ids.shape[1])
        return binding

    def _bind_place(self, binding: Binding, rows: slice, tokens: int) -> None:
        """Bind the attention mask and the positions of the new tokens."""
        past = self.lengths[rows]
        everything = int(past.max()) + tokens
        mask = (np.arange(everything) < (past + tokens)[:, None]).astype(np.int64)
        binding.input("attention_mask", mask)
        binding.input("position_ids", past[:, None] + np.arange(tokens))


class GrowingCache:
    """A cache whose outputs `present.*` of one run are the inputs `past_key_values.*` of the next."""

    def __init__(self, model: Graph) -> None:
        self._model = model
        self._values: dict[str, Any] = {}
        self.length = 0

    def extend(self, ids: np.ndarray, mask: np.ndarray | None, positions: np.ndarray | None) -> np.ndarray:
        """Append `ids` [rows, tokens]; logits [rows, tokens, vocabulary]. `mask` and `positions` are those of transformers."""
        model, (rows, tokens) = self._model, ids.shape
        everything = self.length + tokens
        mask = np.ones((rows, everything), np.int64) if mask is None else mask
        positions = np.arange(self.length, everything)[None].repeat(rows, 0) if positions is None else positions
        binding = Binding(model.session)
        feeds = {"input_ids": ids, "attention_mask": mask} | (
            {"position_ids": positions} if model.has_positions else {}
        )
        for name, array in feeds.items():
            binding.input(name, array)
        for name, (heads, width) in model.past.items():
            empty = np.empty((rows, heads, 0, width), model.cache_type)
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
        """Drop all tokens."""
        self._values, self.length = {}, 0

    def batch_repeat_interleave(self, copies: int) -> None:
        self._values = {name: _shared(value.numpy().repeat(copies, 0)) for name, value in self._values.items()}

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.numpy()
        self._values = {name: _shared(value.numpy()[rows]) for name, value in self._values.items()}


class Binding:
    """An IO binding that keeps its arrays alive, whose memory ONNX Runtime reads and writes."""

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
    """An `OrtValue` that shares the memory of an array."""
    import onnxruntime as ort

    if not isinstance(value, np.ndarray):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
