"""Which cache serves a generation: all tokens, or a window of them; exact, or in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from lowmem.errors import Unsupported
from lowmem.generate.cache import factory as kv
from lowmem.generate.cache.block import BlockLayer, OrderedRing, Unfolded
from lowmem.generate.cache.ring import Ring, Stream
from lowmem.generate.cache.rotary import Turn, key_turns, position_limit
from lowmem.generate.cache.window import WindowCache, WindowLayer
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import check_window
from lowmem.planning.cache import bits_of


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
    if hasattr(model, "make_cache"):
        return _own_cache(model, options, rows, capacity)
    if options.window:
        limit = position_limit(model.config)
        check_window(options, limit)
        turns = key_turns(model)
        if turns is not None:
            return _window_cache(model, options, turns, rows, Stream(pads, limit))
        capacity = min(capacity, options.window)
    return kv.make_cache(model.config, rows=rows, capacity=capacity, kv=options.kv, pads=pads)


def _own_cache(model: Any, options: GenerateOptions, rows: int, capacity: int) -> Any:
    """The cache of a model that makes its own, as an exported graph does, whose cache is bound in place."""
    if options.kv != "same":
        raise Unsupported(
            f"An exported graph keeps its KV cache in fp32, not in {options.kv}.",
            "Store the KV cache in the same precision as the computation, or load with the torch backend.",
        )
    if options.window:
        check_window(options, position_limit(model.config))
        capacity = min(capacity, options.window)
    return model.make_cache(rows, capacity)


def kept_tokens(window: int) -> int:
    """Tokens that are read anew when a cache that cannot slide is full, the latest included."""
    return window - window // 4


def _window_cache(model: Any, options: GenerateOptions, turns: Sequence[Turn], rows: int, stream: Stream) -> Cache:
    decoder = model.config.get_text_config(decoder=True)
    described = kv.layer_kinds(decoder)
    unfolded, rings, layers = Unfolded(), dict[str, Ring](), list[WindowLayer]()
    for (kind, given), turn in zip(described, turns, strict=True):
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise Unsupported(
                f"Layers of the kind {kind!r} in {decoder.model_type!r} cannot be given a window, or fewer bits.",
                "Generate without.",
            )
        native = known is DynamicSlidingWindowLayer
        packed = not native and options.kv not in ("same", "ram")  # a window is small: it stays where it is read
        if kind not in rings:
            make = OrderedRing if packed else Ring
            rings[kind] = (
                Ring(stream, 0, given["sliding_window"]) if native else make(stream, options.sinks, options.window)
            )
        ring = rings[kind]
        if isinstance(ring, OrderedRing):
            layers.append(BlockLayer(ring, rows, turn, bits_of(options.kv), unfolded))
        else:
            layers.append(WindowLayer(ring, rows, turn, native))
    return WindowCache(stream, layers, [kind for kind, _ in described], model.config._attn_implementation == "eager")
