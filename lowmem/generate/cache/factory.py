"""The KV cache: layers that are allocated once, for a known number of rows and tokens.

Layers follow the contract of transformers 5 (`cache_utils.CacheLayerMixin`): `update` gets
the new keys and values [batch, heads, tokens, head_dim], already rotated, and returns the
whole history. Growing by `torch.cat`, as transformers' own layers do, holds a layer twice
while it grows and leaves the allocator with holes; these write in place, so the memory is
2 * layers * kv_heads * head_dim * rows * capacity elements and not a byte more. On a CPU,
pages that were never written cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)

from lowmem.errors import Unsupported
from lowmem.generate.cache.full import DummyLayer, FullLayer
from lowmem.planning.cache import bits_of


def make_cache(
    config: PreTrainedConfig, *, rows: int, capacity: int, kv: str = "same", pads: Sequence[int] = ()
) -> Cache:
    """An empty cache for at most `rows` sequences of `capacity` tokens, its layers of the kinds that `config` names.

    Sliding-window layers stay transformers' own: they hold a window, in the dtype of the
    computation. Memory is taken during the first forward pass.

    Args:
        kv: "same" stores the dtype of the computation, "int8", "int4" and "int2" see `longctx.packed_layer`,
            "ram" see `offload.kv_offload`.
        pads: padding in front of each row, none when left out.

    Raises:
        Unsupported: the model remembers something else than keys and values.
    """
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise _unsupported(config)
    sharing = any(getattr(decoder, "kv_sharing_modes", None) or ()) or getattr(decoder, "num_kv_shared_layers", None)
    if kv != "same" and sharing:
        # A layer that reads another's keys would find the shared buffer overwritten.
        raise Unsupported(
            f"Layers of {config.model_type!r} share keys and values, which the {kv} cache cannot serve.",
            "Store the KV cache in the same precision as the computation.",
        )
    from lowmem.generate.cache.block import Unfolded
    from lowmem.generate.cache.cpu_offload import RamLayer, Shuttle
    from lowmem.generate.cache.packed import PackedLayer  # which, like the next, builds on the layers here

    unfolded, shuttle = Unfolded(), Shuttle()

    def layer(kind: str, arguments: dict[str, Any]) -> CacheLayerMixin:
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known is DynamicLayer:
            if kv == "ram":
                return RamLayer(rows, capacity, shuttle)
            if kv == "same":
                return FullLayer(rows, capacity)
            return PackedLayer(rows, capacity, bits_of(kv), pads or (0,) * rows, unfolded)
        if known in (DynamicSlidingWindowLayer, DummyLayer) and known is not None:
            return known(**arguments)
        raise _unsupported(config)

    return Cache(layers=[layer(*described) for described in layer_kinds(decoder)])


def layer_kinds(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """What each layer remembers in transformers' words ("sliding_attention"), and its layer's arguments."""
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    if isinstance(arguments, dict):  # the same for all layers, until transformers 5.15
        return [(kind, arguments) for kind in kinds]
    return list(zip(kinds, arguments, strict=True))


def check_supported(model: Any) -> None:
    """Raise `Unsupported` for a model whose memory is a state and not keys and values."""
    if getattr(model, "_is_stateful", False):
        raise _unsupported(model.config)


def _unsupported(config: Any) -> Unsupported:
    return Unsupported(
        f"Models of the kind {config.model_type!r} remember more than keys and values, which this cache cannot hold.",
        "Switch the KV cache off (slow), or choose another model.",
    )
