"""Predicted memory of the KV cache, by the same accounting as the cache layers themselves."""

from __future__ import annotations

from collections.abc import Iterator

from lowmem.messages import msg
from lowmem.models.anatomy import LayerCache
from lowmem.models.spec import DTYPE_BYTES, ModelSpec
from lowmem.planning.plan import Line, Plan
from lowmem.units import format_bytes

CACHE_TYPES = ("same", "int8", "int4", "int2", "ram")

BLOCK = 64
"""Tokens quantized together (`generate.cache`); as many of the latest tokens stay unquantized."""

EXACT_FIRST = 4
"""First tokens that stay unquantized even without a window: attention concentrates on them."""

LARGEST_CHUNK = 256
"""Most new tokens in one pass once the text is longer than the window."""

MOST_SINK_COPIES = 1024
"""Most copies of sink tokens in such a pass."""


def kv_bytes(
    spec: ModelSpec, context: int, batch: int, dtype: str, cache_type: str, window: int = 0, sinks: int = EXACT_FIRST
) -> int:
    """Bytes of the KV cache for `batch` sequences of `context` tokens, or of `sinks` first and `window` latest tokens.

    Args:
        cache_type: "same" (as `dtype`), "ram" (the same, held in RAM), "none", or "int8", "int4", "int2": blocks of tokens
            with fp16 scales and offsets, and the first and latest tokens unquantized.
    """
    if cache_type == "none":
        return 0
    tokens = min(context, window + sinks) if window else context
    return batch * sum(_layer_bytes(layer, tokens, dtype, cache_type, window, sinks) for layer in spec.caches)


def _layer_bytes(layer: LayerCache, tokens: int, dtype: str, cache_type: str, window: int, sinks: int) -> int:
    """Bytes of one layer and sequence."""
    size, fixed = DTYPE_BYTES[dtype], layer.fixed_bytes(dtype)
    # A window also keeps the sinks' keys in fp32, unrotated, so that they can be rotated to new positions.
    copies = 2 * 4 * layer.heads * layer.key_dim * sinks if window else 0
    if cache_type in ("same", "ram") or layer.window or layer.index or not layer.heads:
        return fixed + copies + layer.numbers * size * min(tokens, layer.window or tokens)
    exact = (
        layer.heads
        * size
        * (
            sinks * (layer.value_dim if window else layer.key_dim + layer.value_dim)
            + BLOCK * (layer.key_dim + layer.value_dim)
        )
    )
    return fixed + copies + exact + blocks_of(tokens, bool(window)) * block_bytes(layer, bits_of(cache_type))


def plan_bytes(plan: Plan, dtype: str) -> int:
    """Bytes of the plan's KV cache."""
    sinks = plan.sinks if plan.window else EXACT_FIRST
    return kv_bytes(plan.spec, plan.context, plan.batch, dtype, plan.cache_type, plan.window, sinks)


def device_bytes(plan: Plan, dtype: str) -> int:
    """The part in the memory of the device that computes: all, or two layers of a cache that is held in RAM."""
    total = plan_bytes(plan, dtype)
    return min(total, 2 * total // plan.spec.layers) if _in_ram(plan) else total


def ram_lines(plan: Plan, dtype: str) -> tuple[Line, ...]:
    """The KV cache held in RAM while a GPU computes."""
    if not _in_ram(plan):
        return ()
    return (Line("kv", plan_bytes(plan, dtype), msg("The KV cache, copied to the GPU layer by layer.")),)


def _in_ram(plan: Plan) -> bool:
    """Whether the cache is held in RAM for a GPU. A window's cache is small and stays on the GPU."""
    return plan.cache_type == "ram" and plan.place.kind == "cuda" and not plan.window


def bits_of(cache_type: str) -> int:
    """Bits per number of "int8", "int4" and "int2"."""
    return int(cache_type.removeprefix("int"))


def block_bytes(layer: LayerCache, bits: int) -> int:
    """Bytes of one block of one layer and sequence: codes, and scales and offsets per channel (keys) or token (values)."""
    codes = BLOCK * (layer.key_dim + layer.value_dim) * bits // 8
    return layer.heads * (codes + 4 * layer.key_dim + 4 * BLOCK)


def blocks_of(tokens: int, window: bool) -> int:
    """Blocks that hold `tokens`; a window's oldest block may be partly evicted, and the next is made before it is freed."""
    return -(-tokens // BLOCK) + (2 if window else 0)


def passes(plan: Plan) -> Iterator[tuple[int, int]]:
    """(most new tokens, tokens they attend to) of each kind of forward pass over a prompt."""
    yield plan.context, plan.cached_tokens
    if plan.window and plan.context > plan.cached_tokens:
        copies = MOST_SINK_COPIES if plan.sinks else 0
        yield LARGEST_CHUNK, plan.cached_tokens + LARGEST_CHUNK + copies


def dequantized_bytes(plan: Plan, dtype: str) -> int:
    """The buffer for one dequantized layer, which all layers share."""
    if plan.cache_type in ("same", "none", "ram"):
        return 0
    largest = max((layer.numbers for layer in plan.spec.caches if not layer.window and not layer.index), default=0)
    return largest * DTYPE_BYTES[dtype] * (plan.cached_tokens + BLOCK) * plan.batch


def sentence(plan: Plan, dtype: str) -> str:
    """What the cache holds, for a person."""
    if plan.cache_type == "none":
        return msg("No cache: every token recomputes the whole context.")
    stored = dtype if plan.cache_type in ("same", "ram") else plan.cache_type
    if plan.window and plan.context > plan.cached_tokens:
        return msg(
            "The latest {window:,} and the first {sinks:,} tokens x {batch} ({stored}), at any text length.",
            window=plan.window,
            sinks=plan.sinks,
            batch=plan.batch,
            stored=stored,
        )
    share = 1 if plan.cache_type in ("same", "ram") else bits_of(plan.cache_type) / (8 * DTYPE_BYTES[dtype])
    per_token = format_bytes(share * plan.spec.kv_bytes_per_token(dtype))
    return msg(
        "{cached_tokens:,} tokens x {batch}, {per_token} per token ({stored}).",
        cached_tokens=plan.cached_tokens,
        batch=plan.batch,
        per_token=per_token,
        stored=stored,
    )
