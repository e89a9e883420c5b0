"""What a model can do with a KV cache, found out by computing: families with recurrent layers differ.

Some continue a prompt only token by token, some ignore padding only in their first pass, some keep a cache of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from lowmem.errors import Unsupported
from lowmem.generate.cache import factory
from lowmem.generate.cache.full import DummyLayer
from lowmem.generate.prompt_lookup import is_exact
from lowmem.models.cache_argument import cache_argument

TOKENS = 6
TOLERANCE, ROUNDED_TOLERANCE = 1e-3, 0.05
"""Relative error of logits, in fp32 and where weights or activations are rounded. A state that is lost changes them more."""


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Args:
    cached: the model computes with a cache that is given to it.
    chunks: a prompt may be read in several passes.
    padded: rows of a batch may begin with padding.
    states: some layers keep a state instead of keys and values.
    """

    cached: bool = True
    chunks: bool = True
    padded: bool = True
    states: bool = False


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
_STATES = (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)

NONE = CacheUse(cached=False, chunks=False, padded=False)

_known: dict[tuple[type, tuple[Any, ...]], CacheUse] = {}


def cache_use(model: Any) -> CacheUse:
    """What `model` can do; takes a few short forward passes, once per kind of model, if its layers keep a state.

    Layers that keep nothing but keys and values can do everything.
    """
    if hasattr(model, "make_cache"):
        return CacheUse()
    if not cache_argument(model):
        return NONE
    kinds = tuple(
        DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        for kind, _ in factory.layer_kinds(model.config.get_text_config(decoder=True))
    )
    key = type(model), kinds
    if key not in _known:
        _known[key] = CacheUse() if all(kind in _PLAIN for kind in kinds) else _measured(model, kinds)
    return _known[key]


@torch.inference_mode()
def _measured(model: Any, kinds: Sequence[Any]) -> CacheUse:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = [(17 * number + 5) % vocabulary for number in range(TOKENS)]
    half, exact = TOKENS // 2, is_exact(model)
    whole = _logits(model, [ids], [TOKENS], cached=False)
    try:
        # Layers of other kinds choose or compress what they attend to, which so short a text does not show.
        known = all(kind in (*_PLAIN, *_STATES) for kind in kinds)
        chunks = known and _close(_logits(model, [ids], [half, TOKENS - half]), whole, exact)
        if not chunks and not _close(_logits(model, [ids], [TOKENS - 1, 1]), whole, exact):
            return NONE
    except (Unsupported, TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return NONE  # a cache of its own
    short = ids[half:]
    together = _logits(model, [ids, [0] * half + short], [TOKENS - 1, 1], [0, half])
    alone = _logits(model, [short], [len(short) - 1, 1])
    return CacheUse(states=True, chunks=chunks, padded=known and _close(together, torch.cat([whole, alone]), exact))


def _logits(
    model: Any, rows: Sequence[list[int]], passes: Sequence[int], pads: Sequence[int] = (), *, cached: bool = True
) -> Tensor:
    """Logits [rows, vocab] after the last token, read in `passes` of so many tokens."""
    ids = torch.tensor(rows, device=model.device)
    inputs: dict[str, Any] = {"use_cache": False}
    if cached:
        cache = factory.make_cache(model.config, rows=len(rows), capacity=ids.shape[1], pads=pads)
        inputs = {"use_cache": True, cache_argument(model): cache}
    start = 0
    for tokens in passes:
        if any(pads):
            places = torch.arange(start + tokens)
            inputs["attention_mask"] = (places >= torch.tensor(pads)[:, None]).long().to(model.device)
        elif cached:
            inputs |= position_inputs(model, start, start + tokens)
        logits = model(input_ids=ids[:, start : start + tokens], **inputs).logits[:, -1]
        start += tokens
    return logits.float()


def position_inputs(model: Any, start: int, end: int) -> dict[str, Tensor]:
    """Positions as an argument of `forward`: some families count tokens by their first layer, which may keep a state."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(start, end, device=model.device)[None]}


def _close(one: Tensor, other: Tensor, exact: bool) -> bool:
    return bool((one - other).norm() <= (TOLERANCE if exact else ROUNDED_TOLERANCE) * other.norm())
