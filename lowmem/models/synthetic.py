"""Llamas of any size with random weights: the memory and speed of a model without its download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from lowmem.models.catalog import synthetic
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.checkpoint_writer import write_shards
from lowmem.models.describe import COMPANIONS, CONFIG
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.units import GB

_INIT_STD = 0.02
_POOL = 1_048_583  # a prime, so that no row of a matrix repeats another


def write_random_model(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab: int = 32_000,
    context: int = 4096,
    tied: bool = False,
    dtype: str = "fp16",
    seed: int = 0,
    tokenizer_from: Path | None = None,
    shard_bytes: int = 2 * GB,
) -> ModelSpec:
    """Write a Llama that transformers loads, one tensor in memory at a time.

    Weights are drawn with standard deviation 0.02 (norms are 1), so activations stay in range and logits finite.

    Args:
        dtype: "fp32", "fp16" or "bf16".
        tokenizer_from: a model folder whose tokenizer files are copied; `vocab` must hold its ids.

    Returns:
        the spec of what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = synthetic(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocab=vocab, context=context, tied=tied, dtype=dtype, name=folder.name,
    )  # fmt: skip
    write_shards(folder, _random_tensors(spec.tensors, seed), shard_bytes)
    (folder / CONFIG).write_text(json.dumps(_config(spec, dtype), indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if tokenizer_from and name not in (CONFIG, "generation_config.json") and (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    return spec


def _random_tensors(tensors: tuple[Tensor, ...], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    # Drawing 7 billion normal numbers takes minutes. Windows into one pool of them are as good for timing.
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(seed)) * _INIT_STD
    position = 0
    for tensor in tensors:
        dtype = TORCH_DTYPES[tensor.dtype]
        if len(tensor.shape) == 1:
            yield tensor.name, torch.ones(tensor.shape, dtype=dtype)
            continue
        yield tensor.name, _window(pool.to(dtype), position, tensor.elements).view(tensor.shape)
        position = (position + tensor.elements) % _POOL


def _window(pool: torch.Tensor, start: int, length: int) -> torch.Tensor:
    """`length` numbers of the endlessly repeated pool, from `start`."""
    result = torch.empty(length, dtype=pool.dtype)
    done = 0
    while done < length:
        piece = pool[start : start + length - done]
        result[done : done + len(piece)] = piece
        done, start = done + len(piece), 0
    return result


def _config(spec: ModelSpec, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype],
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
