"""A model's log-probabilities over a passage, window by window, a segment of tokens at a time.

The decoder runs once over a window; its output head, whose logits are the largest tensor there is,
runs over a few tokens at a time. It stays the model's own `forward` that does so, with whatever the
family does to its logits: the decoder within only returns what it has computed already.
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
from lowmem.generate.decoding import cancellable, no_check
from lowmem.machine.monitor import trim_heap
from lowmem.measure.options import LOGITS_BYTES
from lowmem.measure.windows import Passage, Window


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive scored tokens: `targets` [rows], and the log-probabilities before each, fp32 [rows, vocab]."""

    log_probs: Tensor
    targets: Tensor


class Consumer(Protocol):
    """Takes slabs in the order of the text and must not change them."""

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
    """Give every scored token of `passage` to each of `consumers`.

    Args:
        cancel: looked at within the forward pass too.
        check: called before every window, may raise.
        segment_bytes: the most bytes of fp32 logits at a time.
    """
    yield Step(0, len(passage.ids), "Scoring the text", "tokens")
    rows = max(1, segment_bytes // (4 * _vocabulary(model)))
    with cancellable(list(model.modules()), cancel):
        for window in passage.windows():
            check()
            # Logits, codes and activations of different sizes leave holes, in which the next do not fit.
            trim_heap()
            targets = torch.tensor(passage.ids[window.first : window.end], device=_device(model))
            for log_probs in _log_probs(model, passage, window, rows):
                count = log_probs.shape[0]
                segment, targets = Segment(log_probs, targets[:count]), targets[count:]
                for consumer in consumers:
                    consumer.add(segment)
            yield Step(window.end, len(passage.ids), "Scoring the text", "tokens")


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def _device(model: Any) -> torch.device:
    return model.device


def _log_probs(model: Any, passage: Passage, window: Window, rows: int) -> Iterator[Tensor]:
    """Log-probabilities [up to `rows`, vocab] of the scored tokens of one window."""
    ids = torch.tensor([[*passage.prefix, *passage.ids[window.start : window.end]]], device=_device(model))
    # The token before a target is the one whose logits predict it.
    first = len(passage.prefix) + window.first - window.start - 1
    positions = torch.arange(first, ids.shape[1] - 1, device=ids.device)
    decoded = _decoded(model, ids)
    # A family that takes its decoder apart: its logits exist whole.
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
    """What the decoder returns for `ids` [1, tokens]; None where the model does not call it as a whole."""
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
    """Within the block `decoder` computes nothing and returns `output`."""
    vars(decoder)["forward"] = lambda *_, **__: output
    try:
        yield
    finally:
        del vars(decoder)["forward"]
