"""Toy models: two random layers of each architecture, and the same as a folder that loads like a real model.

Weights are wide enough that the best token is clear: rounding in another order of additions
does not change it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PAD, BOS, EOS, TURN = range(256, 260)
SPECIALS = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", TURN: "<turn>"}
VOCABULARY = 260
CONTEXT = 512
WINDOW = 16
"""Tokens that the sliding layers of "mistral" and "gemma3" remember."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 96}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
}

NAMES = tuple(_CONFIGS)


def config(name: str) -> transformers.PreTrainedConfig:
    kind, changes = _CONFIGS[name]
    shape = (
        {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        if name == "gpt2"
        else _SHAPE
    )
    return getattr(transformers, kind)(**{**shape, **changes})


@functools.cache
def toy(name: str) -> transformers.PreTrainedModel:
    """The toy of an architecture, the same object every time: do not change it, take a `fresh` one for that."""
    model = transformers.AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(NAMES.index(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms keep their 1 (or Gemma's 0) and get a little noise.
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval().requires_grad_(False)


def fresh(name: str) -> transformers.PreTrainedModel:
    """A toy of one's own."""
    return copy.deepcopy(toy(name))


@functools.cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, token 0 to 255, and four special ones; with a chat template."""
    core = Tokenizer(
        models.BPE(vocab={character: byte for byte, character in enumerate(_byte_characters())}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIALS.values()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIALS[PAD],
        unk_token=SPECIALS[PAD],
        bos_token=SPECIALS[BOS],
        eos_token=SPECIALS[EOS],
        additional_special_tokens=[SPECIALS[TURN]],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def save_toy(name: str, folder: Path) -> Path:
    """Write the toy and its tokenizer as a model folder: safetensors, configuration, chat template."""
    toy(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids without special ones."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
