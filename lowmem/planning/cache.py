"""Predicted memory of the KV cache and of what attention makes of it, by the same accounting as the cache layers'."""

from __future__ import annotations

from collections.abc import Iterator

from lowmem.models.spec import DTYPE_BYTES, ModelSpec
from lowmem.planning.plan import Line, Plan
from lowmem.units import format_bytes

KV_STORAGES = ("same", "int8", "int4", "int2", "ram")

BLOCK = 64
"""Tokens that are quantized together (`longctx.kv_quant`); so many of the latest stay exact."""

EXACT_FIRST = 4
"""First tokens that stay exact without a window, too: attention leans on them."""

LARGEST_CHUNK = 256
MOST_SINK_COPIES = 1024
"""Of a pass over the end of a window: its most tokens, and copies of the sinks (`longctx.sinks`)."""


def kv_bytes(
    spec: ModelSpec, context: int, batch: int, dtype: str, kv: str, window: int = 0, sinks: int = EXACT_FIRST
) -> int:
    """KV cache for `batch` sequences of `context` tokens, or of `sinks` first and `window` latest ones.

    `kv` is "same" (as `dtype`), "int8", "int4" or "int2" (blocks of tokens with fp16 scales and offsets, beside
    exact first and latest tokens) or "none"; "ram" is "same", see `device_bytes` for where.
    """
    if kv == "none":
        return 0
    tokens = min(context, window + sinks) if window else context
    number = spec.kv_heads * spec.head_dim
    # A window's first keys and their partners are in fp32, beside the places where they are turned.
    copies = 2 * 4 * number * sinks if window else 0
    if kv in ("same", "ram"):
        return spec.kv_bytes(tokens, batch, dtype) + batch * spec.layers * copies
    exact = number * DTYPE_BYTES[dtype] * ((1 if window else 2) * sinks + 2 * BLOCK)
    full = copies + exact + blocks_of(tokens, bool(window)) * block_bytes(spec, bits_of(kv))
    native = 2 * number * DTYPE_BYTES[dtype] * min(context, spec.sliding_window)
    return batch * sum(native if kind == "sliding" else full for kind in spec.layer_types)


def plan_bytes(plan: Plan, dtype: str) -> int:
    """The KV cache of a plan, with its window or without."""
    sinks = plan.sinks if plan.window else EXACT_FIRST
    return kv_bytes(plan.spec, plan.context, plan.batch, dtype, plan.kv, plan.window, sinks)


def device_bytes(plan: Plan, dtype: str) -> int:
    """What of it lies where the model computes: all, or two layers of one that a GPU keeps in RAM."""
    every = plan_bytes(plan, dtype)
    return min(every, 2 * every // plan.spec.layers) if _waits(plan) else every


def ram_lines(plan: Plan, dtype: str) -> tuple[Line, ...]:
    """The KV cache that a GPU keeps in RAM."""
    if not _waits(plan):
        return ()
    return (Line("kv", plan_bytes(plan, dtype), "The KV cache; each layer's crosses to the GPU in its turn."),)


def _waits(plan: Plan) -> bool:
    """Does the KV cache wait in RAM? That of a window is small and stays on the GPU."""
    return plan.kv == "ram" and plan.place.kind == "cuda" and not plan.window


def bits_of(kv: str) -> int:
    """Bits of a stored number, for "int8", "int4" and "int2"."""
    return int(kv.removeprefix("int"))


def block_bytes(spec: ModelSpec, bits: int) -> int:
    """One packed block of one layer and row: codes; scale and offset per channel for keys, per token for values."""
    return spec.kv_heads * (2 * BLOCK * spec.head_dim * bits // 8 + 4 * spec.head_dim + 4 * BLOCK)


def blocks_of(tokens: int, window: bool) -> int:
    """Blocks for so many tokens; a window's oldest may be cut, and the next is made before it goes."""
    return -(-tokens // BLOCK) + (2 if window else 0)


def passes(plan: Plan) -> Iterator[tuple[int, int]]:
    """(most tokens, tokens they attend to) of the passes over a prompt."""
    yield plan.context, plan.remembered
    if plan.window and plan.context > plan.remembered:
        copies = MOST_SINK_COPIES if plan.sinks else 0
        yield LARGEST_CHUNK, plan.remembered + LARGEST_CHUNK + copies


def unfolded_bytes(plan: Plan, dtype: str) -> int:
    """One layer's whole history, dequantized for attention; shared by all layers."""
    if plan.kv in ("same", "none", "ram"):
        return 0
    return plan.spec.kv_bytes(plan.remembered + BLOCK, plan.batch, dtype) // plan.spec.layers


def sentence(plan: Plan, dtype: str) -> str:
    """What is remembered, for a person."""
    if plan.kv == "none":
        return "No cache: everything is computed anew for every token."
    stored = dtype if plan.kv in ("same", "ram") else plan.kv
    if plan.window and plan.context > plan.remembered:
        latest = f"The latest {plan.window:,} tokens and the first {plan.sinks:,}"
        return f"{latest}, however long the text, x {plan.batch} ({stored})."
    share = 1 if plan.kv in ("same", "ram") else bits_of(plan.kv) / (8 * DTYPE_BYTES[dtype])
    per_token = format_bytes(share * plan.spec.kv_bytes_per_token(dtype))
    return f"{plan.remembered:,} tokens x {plan.batch} at {per_token} a token ({stored})."
