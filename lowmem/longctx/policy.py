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
from lowmem.generate import kv
from lowmem.generate.options import GenerateOptions
from lowmem.longctx.kv_quant import BlockLayer, OrderedRing, Unfolded, no_turn
from lowmem.longctx.limits import ENDLESS, check_window
from lowmem.longctx.ring import Ring, Stream
from lowmem.longctx.rotation import Turn, adds_position_to_scores, key_turns, position_limit
from lowmem.longctx.sinks import WindowCache, WindowLayer
from lowmem.planning.cache import EXACT_FIRST, bits_of


def make_cache(model: Any, options: GenerateOptions, *, rows: int, capacity: int, pads: Sequence[int]) -> Cache:
    """An empty cache for at most `rows` sequences.

    With a window it is a `WindowCache` where the model's keys turn with position. Elsewhere (GPT-2, BLOOM)
    it has room for the window and is filled anew whenever it is full.

    Args:
        capacity: most tokens of one sequence.
        pads: tokens of padding in front of each row.

    Raises:
        BadInput: a window, or sinks, that the model cannot have.
        Unsupported: the model remembers something else than keys and values, or not in so few bits.
    """
    if hasattr(model, "make_cache"):
        return _own_cache(model, options, rows, capacity)
    few_bits = options.kv in ("int4", "int2")
    if not options.window:
        if few_bits:
            return _packed_cache(model, options, rows, capacity, pads)
        return kv.make_cache(model.config, rows=rows, capacity=capacity, kv=options.kv)
    limit = position_limit(model.config)
    check_window(options, limit)
    turns = key_turns(model)
    if turns is not None:
        return _window_cache(model, options, turns, rows, Stream(pads, limit), bounded=True)
    if few_bits:
        raise _positions_unsupported(model, f"a window in {options.kv}", "Store the KV cache in int8, or in the same.")
    return kv.make_cache(model.config, rows=rows, capacity=min(capacity, options.window), kv=options.kv)


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


def _packed_cache(model: Any, options: GenerateOptions, rows: int, capacity: int, pads: Sequence[int]) -> Cache:
    """Packed blocks of all tokens: a window that is never full, so that no key is ever turned."""
    if adds_position_to_scores(model.config):
        raise _positions_unsupported(model, f"a KV cache in {options.kv}", "Store the KV cache in int8.")
    decoder = model.config.get_text_config(decoder=True)
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    turns = [no_turn(head_dim)] * decoder.num_hidden_layers
    whole = _Whole(sinks=EXACT_FIRST, window=max(1, capacity - EXACT_FIRST), kv=options.kv)
    return _window_cache(model, whole, turns, rows, Stream(pads, ENDLESS), bounded=False)


class _Whole:
    """Options of a window as long as the text."""

    def __init__(self, sinks: int, window: int, kv: str) -> None:
        self.sinks, self.window, self.kv = sinks, window, kv


def _window_cache(
    model: Any, options: GenerateOptions | _Whole, turns: Sequence[Turn], rows: int, stream: Stream, bounded: bool
) -> Cache:
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
            layers.append(BlockLayer(ring, rows, turn, bits_of(options.kv), unfolded, bounded))
        else:
            layers.append(WindowLayer(ring, rows, turn, native))
    return WindowCache(stream, layers, [kind for kind, _ in described], model.config._attn_implementation == "eager")


def _positions_unsupported(model: Any, what: str, hint: str) -> Unsupported:
    kind = model.config.get_text_config(decoder=True).model_type
    return Unsupported(f"The positions of {kind!r} are not in its keys, so it cannot have {what}.", hint)
