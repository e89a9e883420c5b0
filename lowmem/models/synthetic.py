"""Writing Llama models of any size with random weights, to measure memory and speed without a download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lowmem.models.catalog import synthetic
from lowmem.models.checkpoint import TORCH_DTYPES
from lowmem.models.checkpoint_writer import write_shards
from lowmem.models.model_files import COMPANIONS, CONFIG
from lowmem.models.quantization import Quantization
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.units import GB

_INIT_STD = 0.02
GPTQ_BITS = 4

_POOL = 1_048_583  # prime, so that no two rows of a matrix are equal


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
    """Write a Llama checkpoint that transformers can load, one tensor in memory at a time.

    Weights have a standard deviation of 0.02 (norms are 1), so that activations stay in range and logits finite.

    Args:
        dtype: "fp32", "fp16" or "bf16".
        tokenizer_from: a model folder whose tokenizer files are copied; `vocab` must cover its ids.

    Returns:
        the spec of the checkpoint.
    """
    spec = synthetic(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        vocab=vocab, context=context, tied=tied, dtype=dtype, name=folder.name,
    )  # fmt: skip
    _write(folder, _random_tensors(spec.tensors, seed), shard_bytes, _config(spec, dtype), tokenizer_from)
    return spec


def write_random_gptq(
    folder: Path, *, group_size: int = 128, seed: int = 0, tokenizer_from: Path | None = None, **shape: Any
) -> None:
    """Write a GPTQ checkpoint with random codes: 4 bits, symmetric, activations in range as well.

    Args:
        shape: arguments of `write_random_model`; `hidden` and `intermediate` must be multiples of the group size.
    """
    spec = synthetic(**shape, dtype="fp16", name=folder.name)
    quantization = {
        "quant_method": "gptq", "bits": GPTQ_BITS, "group_size": group_size, "desc_act": False, "sym": True,
    }  # fmt: skip
    config = _config(spec, "fp16") | {"quantization_config": quantization}
    _write(folder, _random_codes(spec.tensors, group_size, seed), 2 * GB, config, tokenizer_from)


def _write(
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    shard_bytes: int,
    config: dict[str, object],
    tokenizer_from: Path | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors, shard_bytes)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COMPANIONS:
        if tokenizer_from and name not in (CONFIG, "generation_config.json") and (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)


def _random_codes(tensors: tuple[Tensor, ...], group: int, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    stored = Quantization("gptq", GPTQ_BITS, group, "gptq")
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if len(tensor.shape) == 1 or ".layers." not in tensor.name:
            yield from _random_tensors((tensor,), seed)
            continue
        (outputs, inputs), layer = tensor.shape, tensor.name.removesuffix(".weight")
        words = torch.randint(-(2**31), 2**31 - 1, stored.qweight_shape(outputs, inputs), generator=generator)
        yield f"{layer}.qweight", words.to(torch.int32)
        # Zero points of 8, stored as 7; codes of 0 to 15 then have a standard deviation of 4.6 around 0.
        yield f"{layer}.qzeros", torch.full((inputs // group, outputs // 8), 0x77777777, dtype=torch.int32)
        yield f"{layer}.scales", torch.full((inputs // group, outputs), _INIT_STD / 4.6, dtype=torch.float16)
        yield f"{layer}.g_idx", torch.arange(inputs, dtype=torch.int32) // group


def _random_tensors(tensors: tuple[Tensor, ...], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    # Drawing 7 billion normal numbers takes minutes. For timing, windows into one pool of them do as well.
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
    """`length` numbers from `start` on, with the pool repeated as often as necessary."""
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
