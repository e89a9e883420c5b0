"""Builds KV caches whose layers are allocated once, for a known number of rows and tokens.

Layers follow the contract of transformers 5 (`cache_utils.CacheLayerMixin`): `update` takes the new keys and values
[batch, heads, tokens, head_dim], already rotated, and returns the whole history. transformers' own layers grow by
`torch.cat`, which holds a layer twice while it grows and fragments the allocator. These layers write in place, so the
cache takes exactly 2 * layers * kv_heads * head_dim * rows * capacity elements. On a CPU, pages that were never written
cost nothing.
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
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from lowmem.errors import Unsupported
from lowmem.generate.cache.full import FullLayer
from lowmem.generate.cache.indexed import IndexedLayer
from lowmem.generate.cache.state import HybridLayer, StateLayer
from lowmem.messages import msg
from lowmem.planning.cache import bits_of


def make_cache(
    config: PreTrainedConfig, *, rows: int, capacity: int, cache_type: str = "same", pads: Sequence[int] = ()
) -> Cache:
    """An empty cache for at most `rows` sequences of `capacity` tokens, with the layer types that `config` names.

    Layers of bounded size (sliding windows, recurrent states) stay in the dtype of the computation, since they are small.
    Memory is allocated during the first forward pass.

    Args:
        cache_type: "same" for the dtype of the computation; "int8", "int4" or "int2" for `packed.PackedLayer`;
            "ram" for `cpu_offload.OffloadedLayer`.
        pads: padding tokens in front of each row; none by default.

    Raises:
        Unsupported: the model keeps a state other than keys and values, or shares keys and values between layers,
            which only "same" supports.
    """
    decoder = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise _unsupported(config)
    sharing = any(getattr(decoder, "kv_sharing_modes", None) or ()) or getattr(decoder, "num_kv_shared_layers", None)
    if cache_type != "same" and sharing:
        # A layer that reads another layer's keys would find the shared buffer overwritten.
        raise Unsupported(
            msg(
                "{model_type!r} layers share keys and values, which the {cache_type} cache does not support.",
                model_type=config.model_type,
                cache_type=cache_type,
            ),
            msg("Set the KV cache type to the precision of the computation."),
        )
    from lowmem.generate.cache.block import DequantizeBuffers
    from lowmem.generate.cache.cpu_offload import LayerPrefetcher, OffloadedLayer
    from lowmem.generate.cache.packed import PackedLayer

    buffers, prefetcher = DequantizeBuffers(), LayerPrefetcher()

    def layer(kind: str, arguments: dict[str, Any]) -> CacheLayerMixin | LinearAttentionCacheLayerMixin:
        known = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if known is DynamicLayer:
            if cache_type == "ram":
                return OffloadedLayer(rows, capacity, prefetcher)
            if cache_type == "same":
                return FullLayer(rows, capacity)
            return PackedLayer(rows, capacity, bits_of(cache_type), pads or (0,) * rows, buffers)
        if known is LinearAttentionLayer:
            return StateLayer(**arguments)
        if known is LinearAttentionAndFullAttentionLayer:
            return HybridLayer(layer("full_attention", {}), **arguments)
        if kind == "indexed_attention":
            return IndexedLayer(rows, capacity)
        if known is None:
            raise _unsupported(config)
        return known(**arguments)

    return Cache(layers=[layer(*described) for described in layer_kinds(decoder)])


def layer_kinds(decoder: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """Each layer's attention type in transformers' terms ("sliding_attention"), and the arguments of its cache layer."""
    kinds, arguments = get_layer_types_and_kwargs(decoder)
    if isinstance(arguments, dict):  # the same for all layers, until transformers 5.15
        return [(kind, arguments) for kind in kinds]
    return list(zip(kinds, arguments, strict=True))


def _unsupported(config: Any) -> Unsupported:
    return Unsupported(
        msg(
            "{model_type!r} models keep a state of a kind that this cache cannot hold.",
            model_type=config.model_type,
        ),
        msg("Turn the KV cache off (slow), or choose another model."),
    )
