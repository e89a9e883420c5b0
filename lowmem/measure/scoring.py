"""Computes a model's log-probabilities over a passage, window by window, in segments of tokens.

The decoder runs once per window, but the output head, whose logits would be the largest tensor, runs over one segment at
a time. To keep whatever a model family does to its logits, this calls the model's own `forward` for each segment, with
the decoder replaced by one that returns the hidden states already computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowmem.events import CancelToken, Step
from lowmem.generate.decoding import cancellable, decoder_config, no_check, tidy_heap
from lowmem.machine.monitor import trim_heap
from lowmem.measure.options import LOGITS_BYTES
from lowmem.measure.windows import Passage, Window
from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive scored tokens: ids `targets` [rows], and fp32 log-probabilities [rows, vocab] that predict them."""

    log_probs: Tensor
    targets: Tensor


class Consumer(Protocol):
    """Receives segments in the order of the text; must not modify them."""

    def add(self, segment: Segment) -> None: ...


@torch.inference_mode()
def score(
    model: nn.Module,
    passage: Passage,
    consumers: Sequence[Consumer],
    *,
    cancel: CancelToken,
    check: Callable[[], None] = no_check,
    segment_bytes: int = LOGITS_BYTES,
) -> Iterator[Step]:
    """Pass every scored token of `passage` to each of `consumers`.

    Args:
        cancel: also checked within forward passes.
        check: called before every window; may raise.
        segment_bytes: upper limit of the fp32 logits of a segment.
    """
    yield Step(0, len(passage.ids), msg("Scoring the text"), "tokens")
    rows = max(1, segment_bytes // (4 * decoder_config(model).vocab_size))
    with cancellable(list(model.modules()), cancel), tidy_heap(model):
        for window in passage.windows():
            check()
            # Tensors of different sizes fragment the heap.
            trim_heap()
            targets = torch.tensor(passage.ids[window.first : window.end], device=_device(model))
            for log_probs in _log_probs(model, passage, window, rows):
                count = log_probs.shape[0]
                segment, targets = Segment(log_probs, targets[:count]), targets[count:]
                for consumer in consumers:
                    consumer.add(segment)
            yield Step(window.end, len(passage.ids), msg("Scoring the text"), "tokens")


def _device(model: Any) -> torch.device:
    # Weights on the meta device arrive with each pass, see `export.reference`.
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _log_probs(model: Any, passage: Passage, window: Window, rows: int) -> Iterator[Tensor]:
    """Log-probabilities of the scored tokens of one window, at most [rows, vocab] at a time."""
    ids = torch.tensor([[*passage.prefix, *passage.ids[window.start : window.end]]], device=_device(model))
    # The logits that predict a target are those of the token before it.
    first = len(passage.prefix) + window.first - window.start - 1
    positions = torch.arange(first, ids.shape[1] - 1, device=ids.device)
    decoded = _decoded(model, ids)
    # Some families do not call their decoder as a whole: compute all logits at once.
    whole = model(input_ids=ids, use_cache=False).logits[0] if decoded is None else None
    for at in positions.split(rows):
        if whole is None:
            with _returning(model.base_model, decoded):
                part = model(input_ids=ids, use_cache=False, logits_to_keep=at).logits[0]
        else:
            part = whole[at]
        part = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        yield part


def _decoded(model: Any, ids: Tensor) -> Any:
    """The decoder's output for `ids` [1, tokens]; None if the model does not call the decoder as a whole."""
    decoder, outputs = model.base_model, []
    if decoder is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    handle = decoder.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return outputs[0] if outputs else None


@contextmanager
def _returning(decoder: nn.Module, output: object) -> Iterator[None]:
    """Make `decoder` return `output` without computing anything."""
    vars(decoder)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del vars(decoder)["forward"]
