"""A head that the files hold is used, whatever config.json says; one that equals the embedding is held once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
from packed_toys import edit_config
from safetensors.torch import load_file, save_file
from test_models_encoded import held_bytes, loaded
from test_models_files import edit_config as set_config

from lowmem.models.source import read_spec

IDS = torch.tensor([toys.prompt(40, seed=3)])
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save(folder: Path, head: str) -> torch.nn.Module:
    """A toy whose config ties embedding and head; returns what its files stand for."""
    model = toys.fresh("llama")
    toys.save_toy("llama", folder)
    tensors = load_file(folder / "model.safetensors")
    if head == "equal":
        tensors[HEAD] = tensors[EMBEDDING].clone()
    if head == "equal but for a row":
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][123] += 1
    if head == "absent":
        del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors")
    model.lm_head.weight.copy_(tensors.get(HEAD, tensors[EMBEDDING]))
    edit_config(folder, None)
    set_config(folder, tie_word_embeddings=True)
    return model


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("head", ["its own", "equal", "equal but for a row", "absent"])
def test_head_of_a_tied_config(tmp_path: Path, head: str, precision: str) -> None:
    reference = save(tmp_path, head)
    spec = read_spec(str(tmp_path))
    assert spec.tied == (head in ("equal", "absent"))
    assert (HEAD in {tensor.name for tensor in spec.tensors}) != spec.tied
    model, predicted = loaded(tmp_path, precision)
    assert held_bytes(model) == predicted
    if precision == "fp32":
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)
