"""Listing the tensors of a model from its shape alone, without any file.

Names, order and biases are those of transformers' checkpoints. Norms and biases are included, so sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterator

from lowmem.models.config import Shape
from lowmem.models.spec import DTYPE_BYTES, Tensor

Parts = Iterator[tuple[str, tuple[int, ...]]]

_TWO_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

FAMILIES = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "phi", "gpt2")
"""Model types supported by `inventory`."""


def inventory(shape: Shape, dtype: str, stored_head: bool | None = None) -> tuple[Tensor, ...]:
    """All tensors in a checkpoint of this shape.

    Args:
        stored_head: whether the checkpoint contains an output embedding; by default when it is not tied.
    """
    head = not shape.tied if stored_head is None else stored_head
    if shape.model_type not in FAMILIES:
        raise ValueError(f"no inventory for {shape.model_type}")
    parts = {"gpt2": _gpt2, "phi": _phi}.get(shape.model_type, _llama_like)(shape, head)
    return tuple(_tensor(name, sizes, dtype) for name, sizes in parts)


def _tensor(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
    tensor = Tensor(name, dtype, shape, 0)
    return Tensor(name, dtype, shape, tensor.elements * DTYPE_BYTES[dtype])


def _llama_like(shape: Shape, head: bool) -> Parts:
    family, hidden = shape.model_type, shape.hidden
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        yield from ((block + name, sizes) for name, sizes in _attention(shape))
        if family == "phi3":
            yield f"{block}mlp.gate_up_proj.weight", (2 * shape.intermediate, hidden)
        else:
            yield f"{block}mlp.gate_proj.weight", (shape.intermediate, hidden)
            yield f"{block}mlp.up_proj.weight", (shape.intermediate, hidden)
        yield f"{block}mlp.down_proj.weight", (hidden, shape.intermediate)
        for norm in _FOUR_NORMS if family in ("gemma2", "gemma3_text") else _TWO_NORMS:
            yield f"{block}{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if head:
        yield "lm_head.weight", (shape.vocab, hidden)


def _attention(shape: Shape) -> Parts:
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.model_type == "phi3":
        yield "self_attn.qkv_proj.weight", (queries + 2 * keys, hidden)
    else:
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"self_attn.{name}_proj.weight", (rows, hidden)
            if shape.model_type == "qwen2":
                yield f"self_attn.{name}_proj.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if shape.model_type in ("qwen3", "gemma3_text"):
        yield "self_attn.q_norm.weight", (shape.head_dim,)
        yield "self_attn.k_norm.weight", (shape.head_dim,)


def _phi(shape: Shape, head: bool) -> Parts:
    hidden, inner = shape.hidden, shape.intermediate
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        block = f"model.layers.{layer}."
        yield from _affine(block + "input_layernorm", (hidden,))
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            yield from _affine(f"{block}self_attn.{name}", (hidden, hidden))
        yield from _affine(block + "mlp.fc1", (inner, hidden))
        yield from _affine(block + "mlp.fc2", (hidden, inner))
    yield from _affine("model.final_layernorm", (hidden,))
    if head:
        yield from _affine("lm_head", (shape.vocab, hidden))


def _gpt2(shape: Shape, head: bool) -> Parts:
    """GPT-2 stores its linear layers transposed (inputs first), and its causal masks."""
    hidden, inner, context = shape.hidden, shape.intermediate, shape.context
    yield "wte.weight", (shape.vocab, hidden)
    yield "wpe.weight", (context, hidden)
    for layer in range(shape.layers):
        block = f"h.{layer}."
        yield from _affine(block + "ln_1", (hidden,))
        yield block + "attn.bias", (1, 1, context, context)
        yield from _affine(block + "attn.c_attn", (hidden, 3 * hidden), 3 * hidden)
        yield from _affine(block + "attn.c_proj", (hidden, hidden))
        yield from _affine(block + "ln_2", (hidden,))
        yield from _affine(block + "mlp.c_fc", (hidden, inner), inner)
        yield from _affine(block + "mlp.c_proj", (inner, hidden), hidden)
    yield from _affine("ln_f", (hidden,))
    if head:
        yield "lm_head.weight", (shape.vocab, hidden)


def _affine(name: str, weight: tuple[int, ...], bias: int = 0) -> Parts:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias or weight[0],)
