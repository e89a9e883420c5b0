"""Quantized checkpoints, others' and ours, load as they are stored, compute what they stand for, and are refused clearly."""

from __future__ import annotations

import json
from pathlib import Path

import packed_toys
import pytest
import torch
import toys
from conftest import machine
from families.check import held_bytes
from packed_toys import Recipe
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lowmem.errors import CorruptModel, Unsupported
from lowmem.events import CancelToken, Chunk, Receipt, drain
from lowmem.generate.options import GenerateOptions
from lowmem.kernels import packed_linear
from lowmem.kernels.int8_fine import FineInt8Linear
from lowmem.kernels.layouts import int8_bytes, packed_bytes
from lowmem.kernels.nbits_linear import NBitsLinear
from lowmem.kernels.packed_linear import PackedLinear
from lowmem.kernels.packed_rows import PackedEmbedding, PackedHead
from lowmem.machine.budget import MemoryBudget
from lowmem.models.fetch import fetch
from lowmem.models.quantization import Quantization
from lowmem.models.source import read_spec
from lowmem.planning.fallback import other_memory, smaller_model
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import loading_peak, weight_bytes
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan
from lowmem.planning.precision import available, candidates
from lowmem.precisions import stored as stored_precision
from lowmem.runtime import loader
from lowmem.runtime.session import Session

LIMITS = MemoryBudget(ram=4_000_000_000)
IDS = torch.tensor([toys.prompt(40, seed=3)])

RECIPES = [
    Recipe(bits=2),
    Recipe(bits=3, symmetric=False),
    Recipe(bits=4),
    Recipe(bits=8),
    Recipe(bits=4, group=-1),
    Recipe(bits=4, symmetric=False, layout="gptq_v2"),
    Recipe(bits=3, act_order=True),
    Recipe(bits=4, act_order=True),
    Recipe(bits=4, symmetric=False, layout="gemm"),
]


def planned(folder: Path, precision: str = "auto") -> Plan:
    return plan(read_spec(str(folder)), machine(ram_gb=16), LIMITS, Goal(context=256, precision=precision))


def loaded(folder: Path) -> PreTrainedModel:
    return drain(loader.load(planned(folder), folder, CancelToken())).model


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel that rounds: packed layers multiplied out in fp32, the rest in fp32."""
    monkeypatch.setattr(packed_linear, "cpu_kernel", lambda _: "plain")
    monkeypatch.setattr(stored_precision, "has_int8_kernels", lambda: False)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "phi3"])
def test_logits_are_those_of_the_dense_weights(tmp_path: Path, name: str, recipe: Recipe) -> None:
    reference = packed_toys.save(name, tmp_path, recipe)
    model = loaded(tmp_path)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {kinds[name] for name in packed_toys.linears(reference)} == {PackedLinear}
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_the_cpus_kernels_agree(tmp_path: Path, name: str, recipe: Recipe) -> None:
    reference = packed_toys.save(name, tmp_path, recipe)
    model = loaded(tmp_path)
    kinds = [type(module) for module in model.modules()]
    kernel = FineInt8Linear if recipe.bits == 8 else NBitsLinear
    tied = model.config.tie_word_embeddings
    heads = recipe.bits == 8 and not tied
    assert kinds.count(kernel) == len(packed_toys.linears(reference)) + heads
    assert PackedEmbedding in kinds
    assert type(model.get_output_embeddings()) is (PackedHead if tied else FineInt8Linear)
    ours, expected = model(IDS).logits, reference(IDS).logits
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=-1).min() > 0.98
    assert (ours.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8


def test_layers_that_are_left_dense_run_beside_packed_ones(tmp_path: Path) -> None:
    reference = packed_toys.save("llama", tmp_path, Recipe())
    _rewrite(tmp_path, lambda tensors: _densify(tensors, reference, "model.layers.1.mlp.up_proj"))
    model = loaded(tmp_path)
    assert isinstance(model.model.layers[1].mlp.up_proj, FineInt8Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, NBitsLinear)
    assert (model(IDS).logits.argmax(-1) == reference(IDS).logits.argmax(-1)).float().mean() > 0.9


def _densify(tensors: dict[str, torch.Tensor], model: PreTrainedModel, layer: str) -> None:
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{layer}.{part}"]
    tensors[f"{layer}.weight"] = model.get_submodule(layer).weight.contiguous()


def _rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.usefixtures("exact")
def test_the_zero_bias_of_old_tools_and_their_own_config_file(tmp_path: Path) -> None:
    reference = packed_toys.save("llama", tmp_path, Recipe(act_order=True))

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer, module in packed_toys.linears(reference).items():
            tensors[f"{layer}.bias"] = torch.zeros(module.out_features, dtype=torch.float16)

    _rewrite(tmp_path, add)
    packed_toys.edit_config(tmp_path, None)
    described = {key: value for key, value in Recipe(act_order=True).config().items() if key != "quant_method"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(described))
    torch.testing.assert_close(loaded(tmp_path)(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_autoawqs_own_config_file(tmp_path: Path) -> None:
    reference = packed_toys.save("llama", tmp_path, Recipe(symmetric=False, layout="gemm"))
    packed_toys.edit_config(tmp_path, None)
    described = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(described))
    torch.testing.assert_close(loaded(tmp_path)(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exact")
def test_a_quantized_output_head(tmp_path: Path) -> None:
    reference = packed_toys.save("llama", tmp_path, Recipe())
    # 260 outputs would not fill words.
    head = packed_toys.round_to_nearest(reference.lm_head.weight[:256], Recipe())
    reference.lm_head.weight[:256] = head.dequantize()
    parts = packed_toys.parts_of(head, Recipe())

    def replace(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:256].contiguous()
        tensors.update({f"lm_head.{part}": tensor.contiguous() for part, tensor in parts.items()})

    _rewrite(tmp_path, replace)
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 256, "pad_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(str(tmp_path))
    assert not spec.tied
    assert spec.packed_layers["lm_head"] == (256, 64)
    model = loaded(tmp_path)
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits[..., :256], rtol=1e-4, atol=1e-4)


def test_a_session_loads_one_and_answers(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe(group=32))
    session = Session()
    hardware = session.hardware()
    chosen = plan(read_spec(str(tmp_path)), hardware, MemoryBudget.detect(hardware), Goal(context=256))
    assert chosen.precision == "stored"
    assert "GPTQ, 4 bits" in chosen.reason
    receipt = list(session.load(chosen))[-1]
    assert isinstance(receipt, Receipt)
    assert receipt.precision == "stored"
    events = list(session.generate("Once upon", GenerateOptions(greedy=True, max_new_tokens=12), raw=True))
    assert any(isinstance(event, Chunk) and event.text for event in events)
    assert events[-1].new_tokens > 0
    assert session.unload() is not None


# --- planning


def test_the_spec_knows_what_is_stored(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe(bits=3, group=64, act_order=True))
    spec = read_spec(str(tmp_path))
    assert spec.quantization == "gptq"
    assert spec.stored == Quantization("gptq", 3, 64, "gptq", desc_act=True)
    assert spec.parameters == sum(p.numel() for p in toys.toy("llama").parameters())
    assert spec.packed_layers["model.layers.0.mlp.down_proj"] == (64, 96)


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    return module.out_features, module.in_features


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_weights_are_counted_to_the_byte(tmp_path: Path, recipe: Recipe) -> None:
    packed_toys.save("llama", tmp_path, recipe)
    spec, model = read_spec(str(tmp_path)), loaded(tmp_path)
    held = sum(p.nbytes for p in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            held += module.codes.nbytes + module.scales.nbytes
        elif isinstance(module, NBitsLinear | FineInt8Linear):
            is_head = module is model.get_output_embeddings()
            size = int8_bytes(260, 64) if is_head else packed_bytes(spec.stored, *_shape(module), "fp32")
            held += size + (0 if module.bias is None else module.bias.nbytes)
    assert weight_bytes(spec, "stored", "fp32") == held
    assert loading_peak(spec, "stored", "fp32") >= held


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_on_a_gpu_the_weights_are_counted_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    packed_toys.save("qwen2", tmp_path, recipe)
    # A CPU that computes in fp16 stands in for the GPU.
    monkeypatch.setattr(loader, "TORCH_DTYPES", {"fp32": torch.float16})
    model, spec = loaded(tmp_path), read_spec(str(tmp_path))
    held = {t.data_ptr(): t.nbytes for m in model.modules() if isinstance(m, PackedLinear) for t in m.buffers()}
    held |= {p.data_ptr(): p.nbytes for p in model.parameters()}
    assert weight_bytes(spec, "stored", "fp16") == sum(held.values())


@pytest.mark.parametrize(("group", "share"), [(32, 0.65), (64, 0.58), (128, 0.58)])
def test_packed_layers_take_less_than_int8(group: int, share: float) -> None:
    held = packed_bytes(Quantization("gptq", 4, group, "gptq"), 4096, 4096, "fp32")
    assert held < share * 4096 * 4096


def test_a_quantized_checkpoint_runs_as_stored_and_in_no_other_way(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe())
    spec, cpu, t4 = read_spec(str(tmp_path)), machine(), machine(vram_gb=15)
    assert candidates(cpu, cpu.cpu, spec) == candidates(t4, t4.device, spec) == ("stored",)
    for precision in ("fp32", "int8", "nf4", "bf16"):
        assert "already quantized with gptq" in available(precision, cpu, spec=spec)
        with pytest.raises(Unsupported, match="runs as stored"):
            planned(tmp_path, precision)
    assert "already quantized" in available("stored", cpu)
    assert available("stored", cpu, spec=spec) is None


def test_the_ladder_keeps_to_what_is_stored(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe())
    on_gpu = plan(
        read_spec(str(tmp_path)), machine(vram_gb=15), MemoryBudget(LIMITS.ram, LIMITS.ram), Goal(context=256)
    )
    assert on_gpu.precision == "stored"
    moved = other_memory(on_gpu)
    assert (moved.precision, moved.device) == ("stored", "cpu")
    smaller = smaller_model(on_gpu)
    assert smaller is None or smaller.precision != "stored"


# --- layers of several widths

SEVERAL = {
    "dynamic": (
        {
            "dynamic": {
                r"+:.*\.down_proj": {"bits": 8},
                r".*self_attn.*": {"group_size": 16},
                r"-:.*\.1\.mlp\.up_proj": {},
            }
        },
        lambda name: (
            None
            if name.endswith("1.mlp.up_proj")
            else Recipe(bits=8)
            if name.endswith("down_proj")
            else Recipe(group=16 if "self_attn" in name else 32)
        ),
    ),
    "extra_config": (
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {
                "model.layers.0.mlp.up_proj": {"bits": 8},
                "model.layers.1.self_attn.q_proj": {"bits": 16},
            },
        },
        lambda name: (
            None
            if name == "model.layers.1.self_attn.q_proj"
            else Recipe(bits=8 if name == "model.layers.0.mlp.up_proj" else 4)
        ),
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_layers_of_several_widths(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described, recipe_of = SEVERAL[case]
    reference = packed_toys.save("llama", tmp_path, Recipe(), recipe_of)
    packed_toys.edit_config(tmp_path, Recipe().config() | described)
    spec = read_spec(str(tmp_path))
    assert {(one.bits, one.group_size) for one in spec.packings} >= {(4, 32), (8, 32)}
    model = loaded(tmp_path)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NBitsLinear)}
    codes = sum(packed_bytes(spec.stored.of(name), *_shape(layer), "fp32") for name, layer in layers.items())
    assert held_bytes(model) + codes == weight_bytes(spec, "stored", "fp32")
    monkeypatch.setattr(packed_linear, "cpu_kernel", lambda _: "plain")
    monkeypatch.setattr(stored_precision, "has_int8_kernels", lambda: False)
    torch.testing.assert_close(loaded(tmp_path)(IDS).logits, reference(IDS).logits, rtol=1e-4, atol=1e-4)


# --- what cannot be run


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "5 bits"),
        ({"quant_method": "awq", "bits": 3, "group_size": 32}, "3 bits"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 32}, "0 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "groups of 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True}, "marlin"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMV"}, "gemv"),
        ({}, "unknown"),
    ],
)
def test_what_cannot_be_run_is_named_before_any_work(tmp_path: Path, described: dict[str, object], words: str) -> None:
    packed_toys.save("llama", tmp_path, Recipe())
    packed_toys.edit_config(tmp_path, described)
    with pytest.raises(Unsupported, match=words) as caught:
        planned(tmp_path)
    assert caught.value.hint


def test_a_config_that_only_says_so_is_refused(tmp_path: Path) -> None:
    toys.save_toy("llama", tmp_path)
    packed_toys.edit_config(tmp_path, Recipe().config())
    with pytest.raises(Unsupported, match="none of its layers is"):
        planned(tmp_path)


def test_codes_of_another_width_than_the_config_says(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe(bits=8))
    packed_toys.edit_config(tmp_path, Recipe(bits=4).config())
    with pytest.raises(CorruptModel, match=r"layers\.0\.\S+qweight is .*GPTQ, 4 bits"):
        loaded(tmp_path)


def test_a_lost_part_is_named(tmp_path: Path) -> None:
    packed_toys.save("llama", tmp_path, Recipe())
    _rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"))
    with pytest.raises(CorruptModel, match=r"layers\.1\.mlp\.up_proj has no scales"):
        loaded(tmp_path)


def test_scales_folded_into_activations_are_refused(tmp_path: Path) -> None:
    """AutoAWQ gives some families an extra layer, without which their results are wrong."""
    packed_toys.save("llama", tmp_path, Recipe(layout="gemm"))
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(96)}))
    with pytest.raises(Unsupported, match=r"mlp\.act\.scales"):
        loaded(tmp_path)


@pytest.mark.real
def test_the_demo_model_keeps_its_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On real text: packed layers and an int8 head against the dense weights that the checkpoint stands for."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    folder = packed_toys.quantize(_fetched("demo"), tmp_path / "packed", Recipe(group=64, symmetric=False))
    text = "\n".join(topics[key] for key in sorted(topics))[-8000:]
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :1024]
    fast = loaded(folder)(ids).logits
    monkeypatch.setattr(packed_linear, "cpu_kernel", lambda _: "plain")
    monkeypatch.setattr(stored_precision, "has_int8_kernels", lambda: False)
    exact = loaded(folder)(ids).logits
    p, q = exact.log_softmax(-1), fast.log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) <= 0.003
    assert (fast.argmax(-1) == exact.argmax(-1)).float().mean() >= 0.96


def _fetched(ref: str) -> Path:
    return drain(fetch(ref))
