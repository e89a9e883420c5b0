"""Reading the header of a GGUF file: metadata and tensors, with the exact size of every packed type.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
Reads no weights, and works on byte ranges of a remote file too.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.errors import CorruptModel, Unsupported
from lowmem.messages import msg
from lowmem.models.files import Ranged, ends_early
from lowmem.models.foreign import reader, short
from lowmem.models.spec import Tensor
from lowmem.models.tensors import MAX_DIMENSIONS

# ggml type id -> (name, elements per block, bytes per block), from ggml's type traits.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("fp32", 1, 4), 1: ("fp16", 1, 2), 30: ("bf16", 1, 2), 28: ("fp64", 1, 8),
    24: ("int8", 1, 1), 25: ("int16", 1, 2), 26: ("int32", 1, 4), 27: ("int64", 1, 8),
    2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144), 13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136),
    29: ("iq1_m", 256, 56), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
}  # fmt: skip

MODEL_TYPES = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3", "gpt2": "gpt2",
    "falcon": "falcon", "bloom": "bloom", "stablelm": "stablelm", "starcoder2": "starcoder2", "nemotron": "nemotron",
    "gemma": "gemma", "granite": "granite", "smollm3": "smollm3", "olmo2": "olmo2", "olmoe": "olmoe", "glm4": "glm4",
    "exaone4": "exaone4", "seed_oss": "seed_oss", "arcee": "arcee", "cohere2": "cohere2", "command-r": "cohere",
    "hunyuan-dense": "hunyuan_v1_dense", "gpt-oss": "gpt_oss", "lfm2": "lfm2", "minimax-m2": "minimax_m2",
}  # fmt: skip
"""GGUF architectures that can be converted -> `model_type` in transformers, where llama.cpp has names of its own."""

_CONFIG_KEYS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
# Planning distinguishes embeddings and linear layers by the names that transformers gives them.
_NAMES = {
    "token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip

_YARN_KEYS = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_SCALING = "rope.scaling."
_FIELDS: dict[str, Any] = {
    "general.architecture": str,
    "general.alignment": int,
    "split.count": int,
    "tokenizer.chat_template": str,
}
_FIELDS_OF_ARCHITECTURE: dict[str, Any] = {
    **{key: float if re.search("epsilon|base|softcapping|scale", key) else int for key in _CONFIG_KEYS},
    **{_SCALING + key: float for key in ("factor", "attn_factor", *_YARN_KEYS)},
    "rope.scale_linear": float,
    _SCALING + "type": str,
    "rope.dimension_count": int,
    "logit_scale": float,
}
"""The type of the metadata that is read here; its keys begin with the architecture."""

MAX_ENTRIES = 2_000_000
"""Metadata, entries of arrays of texts, and tensors: the vocabulary and merges of the largest tokenizers are half of that."""

MAX_HEADER = 64 * 2**20
"""Bytes before the tensors."""

MAX_KEY, MAX_VALUE = 65_535, 2**20
"""Bytes of a key or a tensor's name, by the format, and of a text that is kept; longer ones are represented by their length."""


@dataclass(frozen=True, slots=True)
class Gguf:
    """Metadata (an array is represented by its length) and tensors in file order, under transformers' names."""

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def has_chat_template(self) -> bool:
        return "tokenizer.chat_template" in self.metadata

    def config(self) -> dict[str, Any]:
        """The metadata as the fields of a config.json."""
        arch = self.metadata.get("general.architecture")
        config: dict[str, Any] = {"model_type": self.model_type}
        for theirs, ours in _CONFIG_KEYS.items():
            if (value := self.metadata.get(f"{arch}.{theirs}")) is not None:
                config[ours] = value
        names = {tensor.name: tensor for tensor in self.tensors}
        if "vocab_size" not in config and (embedding := names.get("model.embed_tokens.weight")) and embedding.shape:
            config["vocab_size"] = embedding.shape[0]
        if "num_experts" in config:
            config["num_local_experts"] = config["num_experts"]
        if scale := self.metadata.get(f"{arch}.logit_scale"):
            config["logits_scaling" if arch == "granite" else "logit_scale"] = scale
        if any(tensor.name.endswith("q_proj.bias") for tensor in self.tensors):
            config["attention_bias"] = True
        size = config.get("head_dim") or config.get("hidden_size", 0) // max(1, config.get("num_attention_heads", 1))
        rotary = self.metadata.get(f"{arch}.rope.dimension_count") or size
        if rotary < size:
            config["partial_rotary_factor"] = rotary / size
        if rope := self._scaled_rope(config, str(arch)):
            config["rope_parameters"] = rope
        return config | {"tie_word_embeddings": "lm_head.weight" not in names}

    @property
    def model_type(self) -> str:
        """`model_type` in transformers."""
        arch = str(self.metadata.get("general.architecture"))
        if arch == "llama" and self.metadata.get("llama.expert_count"):
            return "mixtral"
        return MODEL_TYPES.get(arch, arch)

    def _scaled_rope(self, config: Mapping[str, Any], arch: str) -> dict[str, Any]:
        """transformers' `rope_parameters` of a model whose rotary positions are scaled, {} of another.

        Raises:
            Unsupported: they are scaled in an unknown way.
        """
        kind = self.metadata.get(f"{arch}.{_SCALING}type")
        factor = self.metadata.get(f"{arch}.{_SCALING}factor")
        if kind is None and (factor := self.metadata.get(f"{arch}.rope.scale_linear")):
            kind = "linear"
        if kind in (None, "none", "longrope") or not factor or factor == 1:  # factors of longrope are tensors
            return {}
        if kind not in ("linear", "yarn"):
            raise Unsupported(
                msg(
                    "The rotary positions of {arch} are scaled by {kind!r}, which is not known.",
                    arch=arch,
                    kind=kind[:80],
                ),
                msg("Choose another file."),
            )
        rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            for key, name in _YARN_KEYS.items():
                if value := self.metadata.get(f"{arch}.{_SCALING}{key}"):
                    rope[name] = value
            if (attention := self.metadata.get(f"{arch}.{_SCALING}attn_factor")) and attention != 1:
                rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
            if arch == "gpt-oss":
                rope["truncate"] = False
        return rope | ({"rope_theta": config["rope_theta"]} if "rope_theta" in config else {})

    def long_rope(self, short: list[float], long: list[float]) -> dict[str, Any]:
        """transformers' `rope_parameters` for frequencies that are divided by `short` or, in long texts, by `long`."""
        arch = self.metadata.get("general.architecture")
        length = self.metadata.get(f"{arch}.{_SCALING}original_context_length") or self.metadata.get(
            f"{arch}.context_length"
        )
        rope = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        attention = self.metadata.get(f"{arch}.{_SCALING}attn_factor")
        return (
            rope
            | {"original_max_position_embeddings": int(length or 0)}
            | ({"attention_factor": attention} if attention else {})
        )


def gguf_parts(name: str) -> list[str]:
    """The names of all files of a GGUF model that `name` is a part of: several if it was split, else one."""
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", name)
    if split is None:
        return [name]
    return [f"{split[1]}-{number:05d}-of-{split[2]}.gguf" for number in range(1, int(split[2]) + 1)]


def read_ggufs(files: Sequence[Ranged]) -> Gguf:
    """`read_gguf` of a model that may be split into several files, the first of which has the metadata."""
    parts = [read_gguf(file) for file in files]
    count = int(parts[0].metadata.get("split.count") or 1)
    if count != len(parts):
        raise CorruptModel(
            msg(
                "{name} is one of {count} parts, but {found} are here.",
                name=files[0].name,
                count=count,
                found=len(parts),
            ),
            msg("Keep all parts in one folder, under the names that they were published with."),
        )
    return Gguf(parts[0].metadata, tuple(tensor for part in parts for tensor in part.tensors))


def read_gguf(file: Ranged) -> Gguf:
    """Parse and validate the header of `file`.

    Raises:
        CorruptModel: not GGUF, or truncated.
        Unsupported: version 1, big-endian, or an unknown tensor type.
    """
    try:
        return _parse(_Cursor(file))
    except (struct.error, UnicodeDecodeError, OverflowError):
        raise CorruptModel(
            msg("{file} is not a valid GGUF file.", file=file.name), msg("Fetch the model again.")
        ) from None


class _Cursor:
    """Reads a header sequentially, in blocks large enough for a remote file."""

    _BLOCK = 1 << 20

    def __init__(self, file: Ranged) -> None:
        self.file, self.position = file, 0
        self._block, self._start = b"", 0
        self._entries = 0

    def take(self, length: int) -> bytes:
        begin = self.position - self._start
        if begin + length > len(self._block):
            self._check_end(self.position + length)
            size = min(max(length, self._BLOCK), self.file.size - self.position)
            self._block, self._start, begin = self.file.read(self.position, size), self.position, 0
        self.position += length
        return self._block[begin : begin + length]

    def skip(self, length: int) -> None:
        self.position += length
        self._check_end(self.position)
        if self.position > self._start + len(self._block):
            self._block, self._start = b"", self.position

    def _check_end(self, end: int) -> None:
        if end > self.file.size:
            raise ends_early(self.file, end)
        if end > MAX_HEADER:
            raise self.corrupt(msg("a header of more than {size:,} bytes", size=MAX_HEADER))

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, what: str) -> int:
        """The number of entries that follow."""
        return self._counted(self.number("Q"), what)

    def _counted(self, entries: int, what: str) -> int:
        self._entries += entries
        if self._entries > MAX_ENTRIES:
            raise self.corrupt(msg("{entries:,} {what}", entries=entries, what=what))
        return entries

    def name(self) -> str:
        length: int = self.number("Q")
        if length > MAX_KEY:
            raise self.corrupt(msg("a name of {length:,} bytes", length=length))
        return self.take(length).decode("utf-8", "replace")

    def corrupt(self, what: str) -> CorruptModel:
        return CorruptModel(
            msg("{file} is not a valid GGUF file: it has {what}.", file=self.file.name, what=what),
            msg("Fetch the model again."),
        )

    def value(self, kind: int) -> Any:
        """A metadata value; an array, or a long text, is skipped and represented by its length."""
        if kind == _STRING:
            length: int = self.number("Q")
            if length <= MAX_VALUE:
                return self.take(length).decode("utf-8", "replace")
            self.skip(length)
            return length
        if kind != _ARRAY:
            return self.number(self._scalar(kind))
        inner, length = self.number("I"), self.number("Q")
        if inner == _STRING:
            self._counted(length, msg("array entries"))
            for _ in range(length):
                self.skip(self.number("Q"))
        elif inner == _ARRAY:
            raise Unsupported(msg("{file} contains nested arrays.", file=self.file.name), msg("Choose another file."))
        else:
            self.skip(length * struct.calcsize("<" + self._scalar(inner)))
        return length

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self.corrupt(msg("a value of the unknown type {kind}", kind=kind))
        return _SCALARS[kind]


def _parse(cursor: _Cursor) -> Gguf:
    name = cursor.file.name
    if cursor.file.size < 24 or cursor.take(4) != b"GGUF":
        raise CorruptModel(msg("{name} is not a GGUF file.", name=name), msg("Check the path, or fetch it again."))
    version = cursor.number("I")
    if version not in (2, 3):
        raise Unsupported(
            msg("{name} is GGUF version {version}; only versions 2 and 3 are supported.", name=name, version=version),
            msg("Choose a newer file."),
        )
    tensor_count, value_count = cursor.count("tensors"), cursor.count(msg("metadata values"))
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.name()
        metadata[key] = cursor.value(cursor.number("I"))
    _check_metadata(cursor, metadata)
    entries = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment") or 32
    start = -(-cursor.position // alignment) * alignment
    end = max((start + offset + tensor.nbytes for tensor, offset in entries), default=start)
    if end > cursor.file.size:
        raise ends_early(cursor.file, end)
    return Gguf(metadata, tuple(tensor for tensor, _ in sorted(entries, key=lambda entry: entry[1])))


def _check_metadata(cursor: _Cursor, metadata: Mapping[str, Any]) -> None:
    """
    Raises:
        CorruptModel: a value that is read here has another type, or is negative.
    """
    arch = metadata.get("general.architecture")
    for key, kind in (_FIELDS | {f"{arch}.{key}": kind for key, kind in _FIELDS_OF_ARCHITECTURE.items()}).items():
        if key in metadata:
            value = metadata[key]
            try:
                reader(kind)(value)
                wrong = kind is not str and value < 0
            except ValueError:
                wrong = True
            if wrong:
                raise cursor.corrupt(msg("{key} = {value}", key=key[:80], value=short(value)))


def _tensor(cursor: _Cursor) -> tuple[Tensor, int]:
    """A tensor and its offset in the data section. GGUF lists the fastest-varying dimension first."""
    name, dimensions = cursor.name(), cursor.number("I")
    if dimensions > MAX_DIMENSIONS:
        raise cursor.corrupt(msg("a tensor of {dimensions} dimensions", dimensions=dimensions))
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in TYPES:
        raise Unsupported(
            msg("{file}: {name} has the unknown type {kind}.", file=cursor.file.name, name=name[:80], kind=kind),
            msg("Choose another file."),
        )
    dtype, block, block_bytes = TYPES[kind]
    tensor = Tensor(_transformers_name(name), dtype, shape, 0)
    if tensor.elements % block:
        raise CorruptModel(
            msg(
                "{file}: {name} has {elements:,} elements, not whole blocks of {block}.",
                file=cursor.file.name,
                name=name[:80],
                elements=tensor.elements,
                block=block,
            ),
            msg("Fetch the model again."),
        )
    return Tensor(tensor.name, dtype, shape, tensor.elements // block * block_bytes), offset


def _transformers_name(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _NAMES:
        return name
    prefix = f"model.layers.{match[1]}." if match[1] else ""
    return f"{prefix}{_NAMES[match[2]]}.{match[3]}"
