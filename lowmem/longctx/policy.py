"""Which cache serves a generation: all tokens, or a window of them; exact, or in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from lowmem.errors import Unsupported
from lowmem.generate import kv
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.limits import check_window
from lowmem.longctx.rotation import Turn, key_turns, position_limit
from lowmem.longctx.sinks import Ring, Stream, WindowCache, WindowLayer


def make_cache(model: Any, options: GenerateOptions, *, rows: int, capacity: int, pads: Sequence[int]) -> Cache:
    """An empty cache for at most `rows` sequences.

    With a window it is a `WindowCache` where the model's keys turn with position. Elsewhere (GPT-2, BLOOM)
    it has room for the window and is filled anew whenever it is full.

    Args:
        capacity: most tokens of one sequence.
        pads: tokens of padding in front of each row.

    Raises:
        BadInput: a window, or sinks, that the model cannot have.
        Unsupported: the model remembers something else than keys and values.
    """
    if not options.window:
        return kv.make_cache(model.config, rows=rows, capacity=capacity, kv=options.kv)
    limit = position_limit(model.config)
    check_window(options, limit)
    turns = key_turns(model)
    if turns is None:
        return kv.make_cache(model.config, rows=rows, capacity=min(capacity, options.window), kv=options.kv)
    return _window_cache(model, options, turns, rows, Stream(pads, limit))


def kept_tokens(window: int) -> int:
    """Tokens that are read anew when a cache that cannot slide is full, the latest included."""
    return window - window // 4


def _window_cache(model: Any, options: GenerateOptions, turns: Sequence[Turn], rows: int, stream: Stream) -> Cache:
    decoder = model.config.get_text_config(decoder=True)
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    rings: dict[str, Ring] = {}
    layers = []
    for kind, given, turn in zip(kinds, arguments, turns, strict=True):
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unsupported(
                f"Layers of the kind {kind!r} in {decoder.model_type!r} cannot be given a window.",
                "Generate without a window.",
            )
        native = known is DynamicSlidingWindowLayer
        if kind not in rings:
            rings[kind] = (
                Ring(stream, 0, given["sliding_window"]) if native else Ring(stream, options.sinks, options.window)
            )
        layers.append(WindowLayer(rings[kind], rows, turn, native))
    return WindowCache(stream, layers, kinds, model.config._attn_implementation == "eager")
