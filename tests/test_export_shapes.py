"""Exports of widths and heads that no kernel was made for, and of families that describe their heads in words of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers
from test_export_generic import export
from test_models_encoded import random_model

from lowmem.errors import Unsupported
from lowmem.events import CancelToken
from lowmem.generate.decoding import Tokens, decode
from lowmem.generate.options import GenerateOptions
from lowmem.models.source import read_spec
from lowmem.runtime.onnx.model import OnnxModel

TOKENS = {"vocab_size": toys.VOCABULARY, "pad_token_id": toys.PAD, "bos_token_id": toys.BOS, "eos_token_id": toys.EOS}

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

SHAPES: dict[str, dict[str, Any]] = {
    "hidden 72, heads of 8": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    "heads of 24": {"head_dim": 24},
    "heads of 20": {"head_dim": 20},
    "heads of 10": {"head_dim": 10},
    "heads of 32, hidden 48": {"hidden_size": 48, "head_dim": 32},
    "inner 100": {"intermediate_size": 100},
    "hidden 36, inner 50": {"hidden_size": 36, "intermediate_size": 50, "head_dim": 12},
    "vocabulary of 261": {"vocab_size": 261},
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "falcon, new": (
        "FalconConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTConfig", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 256}),
    "gpt_neox": ("GPTNeoXConfig", LLAMA),
}  # fmt: skip


def saved(config: Any, folder: Path) -> torch.nn.Module:
    model = random_model(config)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return model


def answers(model: object, *prompts: list[int]) -> list[list[int]]:
    options = GenerateOptions(greedy=True, max_new_tokens=6, prefill_chunk=16)
    rows: list[list[int]] = [[] for _ in prompts]
    for event in decode(model, prompts, options, eos_ids=frozenset(), cancel=CancelToken()):  # type: ignore[arg-type]
        if isinstance(event, Tokens):
            for row, token in zip(rows, event.ids, strict=True):
                row.append(token)
    return rows


PROMPTS = [toys.prompt(length, seed=length) for length in (23, 4, 9)]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_becomes_a_graph(tmp_path: Path, shape: str, precision: str) -> None:
    saved(transformers.LlamaConfig(**TOKENS | LLAMA | SHAPES[shape]), tmp_path / "m")
    receipt = export(tmp_path / "m", tmp_path / "out", precision=precision, group_size=16)
    assert receipt.details["parity"]["passed"]
    graph = OnnxModel(tmp_path / "out")
    alone = [answers(graph, ids)[0] for ids in PROMPTS]
    assert answers(graph, *PROMPTS) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_words_of_their_own(tmp_path: Path, family: str) -> None:
    kind, shape = FAMILIES[family]
    model = saved(getattr(transformers, kind)(**TOKENS | shape), tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", precision="fp32")
    assert answers(OnnxModel(tmp_path / "out"), *PROMPTS) == answers(model, *PROMPTS)


@pytest.mark.parametrize("family", ["gpt2", "phi", "llama"])
def test_a_row_of_a_batch_is_computed_as_alone(tmp_path: Path, family: str) -> None:
    """A token with large activations beside it changes nothing."""
    model = toys.fresh(family)
    model.get_input_embeddings().weight[7] *= 50
    model.save_pretrained(tmp_path / "m")
    toys.tokenizer().save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", precision="int8", fused=False)
    graph = OnnxModel(tmp_path / "out")
    ids = torch.tensor([toys.prompt(12, 3), [7, *toys.prompt(11, 4)]])
    together, alone = graph(ids).logits[:1], graph(ids[:1]).logits
    assert (together - alone).abs().max() < 1e-4 * alone.abs().max()


def test_new_falcon_caches_every_key_head(tmp_path: Path) -> None:
    kind, shape = FAMILIES["falcon, new"]
    saved(getattr(transformers, kind)(**TOKENS | shape), tmp_path)
    assert read_spec(str(tmp_path)).kv_bytes_per_token("fp32") == 2 * 2 * 4 * 16 * 4  # its code repeats 2 heads to 4


def test_a_graph_whose_rotation_depends_on_the_length_is_held_to_what_it_was_traced_for(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 8.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = saved(transformers.LlamaConfig(**TOKENS | LLAMA, rope_parameters=rope), tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", precision="fp32")
    graph = OnnxModel(tmp_path / "out")
    assert answers(graph, PROMPTS[0]) == answers(model, PROMPTS[0])
    with pytest.raises(Unsupported, match="32 tokens"):
        answers(graph, toys.prompt(30))
