"""Chooses the KV cache for a generation: full or windowed, exact or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from lowmem.errors import Unsupported
from lowmem.generate.cache import factory
from lowmem.generate.cache.block import BlockLayer, DequantizeBuffers, OrderedRing
from lowmem.generate.cache.full import DummyLayer
from lowmem.generate.cache.ring import Ring, Stream
from lowmem.generate.cache.rotary import Rotation, key_rotations, position_limit
from lowmem.generate.cache.state import HybridLayer, StateLayer
from lowmem.generate.cache.window import WindowCache, WindowLayer
from lowmem.generate.options import GenerateOptions
from lowmem.generate.window_limits import check_window
from lowmem.messages import msg
from lowmem.models.meta_model import context_limit
from lowmem.planning.cache import bits_of

_HYBRID = tuple(DYNAMIC_LAYER_TYPE_MAPPING.get(kind) for kind in ("hybrid", "hybrid_sliding"))
_ATTENDING = (DynamicLayer, DynamicSlidingWindowLayer, *_HYBRID)


def make_cache(model: Any, options: GenerateOptions, *, rows: int, capacity: int, pads: Sequence[int]) -> Cache:
    """An empty cache for at most `rows` sequences.

    With a window, models with rotary embeddings get a `WindowCache`. Others (GPT-2, BLOOM) get a cache with room for
    the window, which is recomputed whenever it is full.

    Args:
        capacity: the most tokens of one sequence.
        pads: padding tokens in front of each row.

    Raises:
        BadInput: the window or the sinks do not fit the model.
        Unsupported: the model keeps a state other than keys and values.
    """
    if hasattr(model, "make_cache"):
        return _own_cache(model, options, rows, capacity)
    if options.window:
        limit = position_limit(model.config)
        check_window(options, limit)
        rotations = key_rotations(model)
        if rotations is not None and any(rotations):
            return _window_cache(model, options, rotations, rows, Stream(pads, limit))
        if rotations is None:
            capacity = min(capacity, options.window)
    return factory.make_cache(model.config, rows=rows, capacity=capacity, cache_type=options.cache_type, pads=pads)


def _own_cache(model: Any, options: GenerateOptions, rows: int, capacity: int) -> Any:
    """The cache of a model that makes its own, such as an exported graph, which binds its cache in place."""
    if options.cache_type != "same":
        raise Unsupported(
            msg("An exported graph keeps its KV cache in fp32, not in {cache_type}.", cache_type=options.cache_type),
            msg("Set the KV cache type to the precision of the computation, or load with the torch backend."),
        )
    if options.window:
        check_window(options, position_limit(model.config))
        capacity = min(capacity, options.window)
    limit = position_limit(model.config)
    if limit < capacity and limit < context_limit(model.config.get_text_config(decoder=True)):
        raise Unsupported(
            msg("An exported graph of this model rotates positions rightly only up to {limit:,} tokens.", limit=limit),
            msg("Load with the torch backend, or keep prompt and answer below {limit:,} tokens.", limit=limit),
        )
    return model.make_cache(rows, capacity)


def never_grows(cache: Any) -> bool:
    """Whether all layers keep states of a fixed size, so that text of any length fits without a window."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) is StateLayer or type(layer) is DummyLayer for layer in layers)


def recomputed_tokens(window: int) -> int:
    """How many of the latest tokens are recomputed when a cache that cannot slide is full."""
    return window - window // 4


def _window_cache(
    model: Any, options: GenerateOptions, rotations: Sequence[Rotation | None], rows: int, stream: Stream
) -> Cache:
    decoder = model.config.get_text_config(decoder=True)
    described = factory.layer_kinds(decoder)
    buffers, rings, layers = DequantizeBuffers(), dict[str, Ring](), list[Any]()
    for (kind, given), rotation in zip(described, rotations, strict=True):
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known is LinearAttentionLayer:  # what it remembers does not grow: no window applies
            layers.append(StateLayer(**given))
            continue
        if known is DummyLayer and known is not None:
            layers.append(known(**given))
            continue
        if rotation is None or known not in _ATTENDING:
            raise Unsupported(
                msg(
                    "The {kind!r} layers of {model_type!r} models support neither a window nor a quantized cache.",
                    kind=kind,
                    model_type=decoder.model_type,
                ),
                msg("Turn off the window and choose an unquantized KV cache."),
            )
        native = "sliding_window" in given
        packed = not native and options.cache_type not in ("same", "ram")  # a window is small: it stays on the device
        if kind not in rings:
            make = OrderedRing if packed else Ring
            rings[kind] = (
                Ring(stream, 0, given["sliding_window"]) if native else make(stream, options.sinks, options.window)
            )
        ring = rings[kind]
        layer = (
            BlockLayer(ring, rows, rotation, bits_of(options.cache_type), buffers)
            if isinstance(ring, OrderedRing)
            else WindowLayer(ring, rows, rotation, native)
        )
        states = {"number_of_states": given["number_of_states"]} if "number_of_states" in given else {}
        layers.append(HybridLayer(layer, **states) if known in _HYBRID else layer)
    return WindowCache(stream, layers, [kind for kind, _ in described], model.config._attn_implementation == "eager")
