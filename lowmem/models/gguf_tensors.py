"""The tensors of a GGUF model as those of transformers' model: dequantized, renamed, and in transformers' layout.

Names come from the tables of the gguf package, layouts from transformers' own converters of GGUF files, where it has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    GGUF_TO_TRANSFORMERS_MAPPING,
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    MiniMaxM2TensorProcessor,
    get_gguf_hf_weights_map,
    load_gguf_checkpoint,
)

from lowmem.models import modules
from lowmem.models.gguf_file import Gguf
from lowmem.models.spec import CONVERSION_BYTES

ROTATES_PAIRS = ("llama", "granite", "smollm3", "arcee")
"""Architectures whose queries and keys llama.cpp reorders, because it rotates neighbours and transformers halves."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Converter:
    """Reads a GGUF model for transformers.

    Args:
        header: of all files.
        files: the parts of the model, in order.
        dtype: of the tensors that come out.

    Attributes:
        config: transformers' configuration of the model.
    """

    def __init__(self, header: Gguf, files: Sequence[Path], dtype: torch.dtype) -> None:
        self._readers = [GGUFReader(file) for file in files]
        self._dtype = dtype
        arch = str(header.metadata["general.architecture"])
        config = _config(files[0], header) | _tokens(header)
        if rope := self._rope(header, config):
            config["rope_parameters"] = rope | {"rope_theta": config.get("rope_theta", 10_000.0)}
        self.config: Any = AutoConfig.for_model(**config)
        model = modules.build(self.config)
        self.config.architectures = [type(model).__name__]
        self._processor = _processor(arch, config)
        self._names = get_gguf_hf_weights_map(model, self._processor, model_type=arch)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that transformers' model has, each once."""
        joined: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for reader in self._readers:
            for tensor in reader.tensors:
                result = self._processor.process(
                    weights=self._dequantized(tensor),
                    name=tensor.name,
                    tensor_key_mapping=self._names,
                    parsed_parameters={"tensors": joined},
                )
                if result.name in self._names:
                    yield (
                        self._names[result.name],
                        torch.from_numpy(np.ascontiguousarray(result.weights)).to(self._dtype),
                    )
                elif result.name is None:  # experts, of which gate and up are joined
                    name = self._names[tensor.name.removesuffix(".weight")]
                    seen[name] = seen.get(name, 0) + 1
                    if seen[name] == (2 if name.endswith("gate_up_proj") else 1):
                        yield name, joined.pop(name).to(self._dtype)

    def _dequantized(self, tensor: Any) -> np.ndarray[Any, Any]:
        """fp32, or the dtype that is written where that is a large matrix; some rows at a time."""
        data = tensor.data
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if len(shape) < 2:
            return dequantize(data, tensor.tensor_type).astype(np.float32)
        out = np.empty(shape, {torch.float32: np.float32, torch.float16: np.float16}[self._dtype])
        step = max(1, CONVERSION_BYTES // (4 * int(np.prod(shape[1:]))))
        for start in range(0, shape[0], step):
            out[start : start + step] = dequantize(data[start : start + step], tensor.tensor_type)
        return out

    def _rope(self, header: Gguf, config: dict[str, Any]) -> dict[str, Any]:
        """`rope_parameters` of a model whose frequencies are divided by factors that lie beside its weights, else {}."""
        names = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
        stored = (tensor for reader in self._readers for tensor in reader.tensors if tensor.name in names)
        factors = {tensor.name: np.asarray(tensor.data, dtype=np.float32) for tensor in stored}
        if set(names[1:]) <= factors.keys():
            return header.long_rope(*(factors[name].tolist() for name in names[1:]))
        plain = factors.get(names[0])
        if plain is None or (plain == 1).all():
            return {}
        rope: dict[str, Any] = {"rope_type": "llama3", "factor": float(plain.max()), **LLAMA3_ROPE}
        if np.allclose(_llama3_factors(len(plain), config.get("rope_theta", 10_000.0), rope), plain, rtol=1e-3):
            return rope
        return header.long_rope(plain.tolist(), plain.tolist()) | {"attention_factor": 1.0}


def _llama3_factors(count: int, theta: float, rope: dict[str, float]) -> np.ndarray[Any, Any]:
    """What Llama 3 divides its frequencies by (`convert_hf_to_gguf.py` of llama.cpp)."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    waves = 2 * np.pi * theta ** (np.arange(count) / count)
    share = np.clip((context / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - share) / rope["factor"] + share))


def _config(file: Path, header: Gguf) -> dict[str, Any]:
    """The metadata as transformers reads it, and what it does not know of the family as `Gguf.config` does."""
    ours = header.config()
    arch = str(header.metadata["general.architecture"])
    tables: Any = GGUF_TO_TRANSFORMERS_MAPPING["config"]
    if arch not in tables:
        tables[arch] = {}
        GGUF_SUPPORTED_ARCHITECTURES.append(arch)  # or it would not read the tokenizer either
    theirs = load_gguf_checkpoint(str(file))["config"]
    theirs.pop("_model_name_or_path", None)
    return ours | theirs | {"model_type": ours["model_type"], "vocab_size": ours["vocab_size"]}


def _tokens(header: Gguf) -> dict[str, Any]:
    """The special tokens by id."""
    kinds = {"bos": "bos", "eos": "eos", "padding": "pad"}
    ids = {f"{ours}_token_id": header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind, ours in kinds.items()}
    return {key: value for key, value in ids.items() if value is not None}


def _processor(arch: str, config: dict[str, Any]) -> Any:
    if arch in TENSOR_PROCESSORS and config["model_type"] != "mixtral":
        return TENSOR_PROCESSORS[arch](config=config)
    if arch.startswith("gemma") and not re.match("gemma[34]n?$", arch):
        return Gemma2TensorProcessor(config=config)
    return _Processor(arch, config)


class _Processor(MiniMaxM2TensorProcessor):
    """Joins experts as transformers stacks them, and puts rotated halves where llama.cpp has pairs."""

    def __init__(self, arch: str, config: dict[str, Any]) -> None:
        super().__init__(config=config)
        self._pairs = LlamaTensorProcessor(config=config) if arch in ROTATES_PAIRS else None

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        if self._pairs is not None:
            weights = self._pairs.process(weights, name).weights
        return super().process(weights, name, **kwargs)
