"""The loader fills what transformers would have loaded, in every precision, and refuses what it must."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import toys
from conftest import machine

from lowmem.errors import BadInput, Cancelled, CorruptModel, LowMemError, Unsupported
from lowmem.events import CancelToken, Step, drain
from lowmem.generate.decoding import decode
from lowmem.generate.options import GenerateOptions
from lowmem.generate.prompts import encode_prompt
from lowmem.kernels.int8_linear import Int8Linear
from lowmem.kernels.packed_rows import PackedEmbedding, PackedHead
from lowmem.machine.budget import MemoryBudget
from lowmem.models.source import read_spec
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import loading_peak, weight_bytes
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.runtime.loader import Loaded, _shape, _tokenizer, load

LIMITS = MemoryBudget(ram=4_000_000_000)


def planned(folder: Path, precision: str) -> Plan:
    return plan(read_spec(str(folder)), machine(ram_gb=16), LIMITS, Goal(context=256, precision=precision))


def loaded(folder: Path, precision: str) -> Loaded:
    steps: list[Step] = []
    model = drain(load(planned(folder, precision), folder, CancelToken()), steps.append)
    assert steps[-1].done == steps[-1].total > 0
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toys")
    return {name: toys.save_toy(name, root / name) for name in toys.NAMES}


IDS = torch.tensor([toys.prompt(40, seed=3)])


@pytest.mark.parametrize("name", toys.NAMES)
def test_fp32_logits_are_those_of_transformers(folders, name):
    ours = loaded(folders[name], "fp32").model(IDS).logits
    torch.testing.assert_close(ours, toys.toy(name)(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", toys.NAMES)
def test_bf16_is_stored_in_half_the_bytes(folders, name):
    model = loaded(folders[name], "bf16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    spec = read_spec(str(folders[name]))
    assert sum(p.nbytes for p in model.parameters()) == weight_bytes(spec, "bf16", "bf16")


@pytest.mark.parametrize("name", toys.NAMES)
def test_int8_stays_close_and_quantizes_every_linear_layer(folders, name):
    model = loaded(folders[name], "int8").model
    kinds = [type(module) for module in model.modules()]
    assert Int8Linear in kinds
    assert PackedEmbedding in kinds
    assert torch.nn.Linear not in kinds
    reference, ours = toys.toy(name)(IDS).logits, model(IDS).logits
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=-1).min() > 0.98
    assert (ours.argmax(-1) == reference.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize(("precision", "error"), [("bnb8", 0.02), ("nf4", 0.12)])
def test_bitsandbytes_layers_compute_what_the_original_layers_do(folders, name, precision, error):
    """Layer by layer: in a whole random toy small errors grow too fast to tell anything."""
    pytest.importorskip("bitsandbytes")
    model, reference = loaded(folders[name], precision).model, toys.toy(name)
    quantized = {n: m for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    linear = {n: m for n, m in reference.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"}
    whole_blocks = {n for n, m in linear.items() if precision == "bnb8" or _shape(m)[1] % 64 == 0}
    assert set(quantized) == whole_blocks
    for layer_name, layer in quantized.items():
        original = reference.get_submodule(layer_name)
        x = torch.randn(64, layer.in_features)
        expected = original(x)
        assert (layer(x).float() - expected).norm() / expected.norm() < error


def test_weights_of_linear_layers_lie_transposed_for_decoding(folders):
    weight = loaded(folders["llama"], "fp32").model.model.layers[0].mlp.up_proj.weight
    assert tuple(weight.shape) == (96, 64)
    assert weight.stride() == (1, 96)


def test_a_tied_head_is_the_embedding_itself(tmp_path):
    folder = _tied(tmp_path)
    model = loaded(folder, "fp32").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tied = loaded(folder, "int8").model
    assert isinstance(tied.lm_head, PackedHead)
    assert tied.lm_head.codes is tied.model.embed_tokens.codes
    cosine = torch.nn.functional.cosine_similarity(tied(IDS).logits, model(IDS).logits, dim=-1)
    assert cosine.min() > 0.98


def _tied(folder: Path) -> Path:
    config = toys.config("llama")
    config.tie_word_embeddings = True
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return folder


def test_older_files_without_the_base_models_prefix_load(tmp_path):
    """GPT-2's original files name "h.0..." what transformers names "transformer.h.0..."."""
    from safetensors.torch import load_file, save_file

    folder = toys.save_toy("gpt2", tmp_path)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)  # a stored mask, which nobody needs
    save_file(tensors, file)
    torch.testing.assert_close(
        loaded(folder, "fp32").model(IDS).logits, toys.toy("gpt2")(IDS).logits, rtol=1e-4, atol=1e-4
    )


def test_loading_stops_between_two_tensors(folders):
    cancel = CancelToken()
    steps = load(planned(folders["llama"], "fp32"), folders["llama"], cancel)
    next(steps)
    cancel.set()
    with pytest.raises(Cancelled):
        next(steps)


def test_a_missing_weight_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = toys.save_toy("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CorruptModel, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(folder, "fp32")


def test_a_weight_of_another_shape_is_named(tmp_path):
    folder = toys.save_toy("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LowMemError, match=r"96.*128|128.*96"):
        loaded(folder, "fp32")


def test_of_a_larger_tokenizer_only_the_tokens_of_a_text_must_be_known(tmp_path):
    """One that has a padding token beyond the embedding, or an image token, is sound (Gemma 3, many of Llama's)."""
    folder = toys.save_toy("llama", tmp_path)
    larger = deepcopy(toys.tokenizer())
    larger.add_tokens([f"token{i}" for i in range(500)])
    larger.save_pretrained(folder)
    found = loaded(folder, "fp32")
    assert len(found.tokenizer) == 760
    torch.testing.assert_close(found.model(IDS).logits, toys.toy("llama")(IDS).logits, rtol=1e-4, atol=1e-4)
    options = GenerateOptions(max_new_tokens=1, greedy=True)
    ids = encode_prompt(found.tokenizer, "say token7", raw=True)
    with pytest.raises(BadInput, match=r"267.*260"):
        list(decode(found.model, [ids], options, eos_ids=frozenset(), cancel=CancelToken()))
    with pytest.raises(BadInput, match=r"267.*260"):  # also where no prompt is decoded, such as when a text is scored
        found.model(torch.tensor([ids]))


@pytest.mark.parametrize("content", ['{"chat_template": "x"}', '{"chat_template": 3}', "["])
def test_the_template_of_a_processor_is_used(tmp_path, content):
    tokenizer = deepcopy(toys.tokenizer())
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert not _tokenizer(tmp_path).chat_template
    (tmp_path / "chat_template.json").write_text(content)
    assert _tokenizer(tmp_path).chat_template == ("x" if '"x"' in content else None)


def test_an_unreadable_tokenizer_is_said(tmp_path):
    folder = toys.save_toy("llama", tmp_path)
    (folder / "tokenizer.json").write_text("{not json")
    with pytest.raises(CorruptModel, match="tokenizer"):
        loaded(folder, "fp32")


def test_an_already_quantized_model_is_refused_before_any_work(tmp_path):
    folder = toys.save_toy("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="gptq"):
        loaded(folder, "fp32")


def test_the_loading_peak_follows_the_order_of_the_file(folders):
    spec = read_spec(str(folders["llama"]))
    weights = weight_bytes(spec, "fp32", "fp32")
    largest = max(tensor.nbytes for tensor in spec.tensors)
    assert weights <= loading_peak(spec, "fp32", "fp32") <= weights + largest
