"""Quantized layers compute what their dense weights would: exactly from the words, within 8-bit activations on the CPU."""

from __future__ import annotations

import sys
import types

import packed_toys
import pytest
import torch
from packed_toys import Recipe
from torch import Tensor, nn

from lowmem.errors import CorruptModel
from lowmem.kernels import gptqmodel_kernel, layouts, nbits_linear
from lowmem.kernels.int8_fine import FineInt8Linear
from lowmem.kernels.int8_linear import Int8Linear, largest_code, quantize_rows
from lowmem.kernels.layouts import SESSION_BYTES, block_size, cpu_kernel, packed_bytes
from lowmem.kernels.nbits_linear import NBitsLinear
from lowmem.kernels.packed_linear import PackedLinear, check_shapes, packed_linear
from lowmem.kernels.quantized import Quantized
from lowmem.models.quantization import Quantization

CPU, META = torch.device("cpu"), torch.device("meta")

RECIPES = [
    *(Recipe(bits=bits, symmetric=symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    *(Recipe(bits=bits, symmetric=False, layout="gptq_v2") for bits in (2, 3, 4, 8)),
    *(Recipe(bits=bits, act_order=True) for bits in (2, 3, 4, 8)),
    Recipe(group=-1),
    Recipe(group=128),
    Recipe(group=64, symmetric=False, act_order=True),
    Recipe(group=32, symmetric=False, layout="gemm"),
]


def stored_as(recipe: Recipe) -> Quantization:
    method = "awq" if recipe.layout == "gemm" else "gptq"
    return Quantization(method, recipe.bits, recipe.group, recipe.layout, recipe.act_order)


def quantized(recipe: Recipe, outputs: int = 96, inputs: int = 160, seed: int = 0) -> Quantized:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return packed_toys.round_to_nearest(weight, recipe)


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def off_by(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def plain(
    recipe: Recipe, weight: Quantized, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The layer that GPUs run, in `dtype` on the CPU, read from the stored parts."""
    from lowmem.kernels.packed_linear import read

    parts = packed_toys.parts_of(weight, recipe)
    return PackedLinear(read(stored_as(recipe), "layer", parts), recipe.group, bias, CPU, dtype)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_plain_layers_are_exact(recipe: Recipe) -> None:
    weight, bias, x = quantized(recipe), torch.randn(96), x_of(2, 5, 160)
    layer = plain(recipe, weight, bias)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().t() + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_cpus_kernels_are_exact_but_for_8_bits(recipe: Recipe) -> None:
    weight, bias, x = quantized(recipe), torch.randn(96), x_of(2, 5, 160)
    parts = packed_toys.parts_of(weight, recipe) | {"bias": bias}
    layer = packed_linear(stored_as(recipe), "layer", parts, CPU, torch.float32)
    assert type(layer) is (FineInt8Linear if recipe.bits == 8 else NBitsLinear)
    tolerance = 0.01 if recipe.bits == 8 else 1e-6
    for part in (x, x[:1, :1]):
        expected = part @ weight.dequantize().t() + bias
        assert layer(part).shape == expected.shape
        assert off_by(layer(part), expected) < tolerance


def test_fine_int8_loses_nothing_to_its_activations() -> None:
    """Outliers are what ruins 8-bit activations."""
    weight, x = torch.randn(300, 160), x_of(3, 7, 160)
    x[..., 5] *= 100
    fine, coarse = FineInt8Linear.from_weight(weight, None), Int8Linear.from_weight(weight, None)
    codes, scales = quantize_rows(weight, largest_code())
    expected = x @ (codes.float() * scales[:, None]).t()
    assert off_by(fine(x), expected) < 5e-4
    assert off_by(coarse(x), expected) > 20 * off_by(fine(x), expected)
    assert not fine(torch.zeros(1, 160)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_plain_layers_in_half_precision(dtype: torch.dtype) -> None:
    weight, x = quantized(Recipe(symmetric=False)), x_of(7, 160)
    y = plain(Recipe(symmetric=False), weight, dtype=dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert off_by(y.float(), x @ weight.dequantize().t()) < 0.01


def test_work_is_shared_among_threads_by_rows_and_by_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight, x = quantized(Recipe()), x_of(50, 160)
    expected = x @ weight.dequantize().t()
    monkeypatch.setattr(nbits_linear, "THREADED_WORK", 1000)
    by_rows = NBitsLinear(weight, 32, None)
    assert len(by_rows._parts) == 1
    torch.testing.assert_close(by_rows(x), expected, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(nbits_linear, "SPLIT_WEIGHTS", 0)
    by_outputs = NBitsLinear(weight, 32, None)
    assert [columns.stop for columns, _ in by_outputs._parts] == [32, 64, 96]
    torch.testing.assert_close(by_outputs(x), by_rows(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_outputs(x[:1]), by_rows(x[:1]), rtol=1e-5, atol=1e-5)


def test_groups_that_cannot_be_blocked_run_in_int8_or_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(group=40)
    assert block_size(40) == 0
    weight, x = quantized(recipe), x_of(3, 160)
    expected = x @ weight.dequantize().t()

    def layer() -> nn.Module:
        return packed_linear(stored_as(recipe), "layer", packed_toys.parts_of(weight, recipe), CPU, torch.float32)

    assert type(layer()) is FineInt8Linear
    assert off_by(layer()(x), expected) < 0.01
    monkeypatch.setattr(layouts.platform, "machine", lambda: "aarch64")
    assert cpu_kernel(stored_as(recipe)) == "plain"
    assert type(layer()) is PackedLinear
    torch.testing.assert_close(layer()(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", [96, 48])
def test_groups_become_as_many_blocks_as_they_need(group: int) -> None:
    recipe = Recipe(group=group, symmetric=False)
    weight, x = quantized(recipe, inputs=288), x_of(3, 288)
    torch.testing.assert_close(NBitsLinear(weight, group, None)(x), x @ weight.dequantize().t(), rtol=1e-5, atol=1e-4)


def test_inputs_that_do_not_fill_the_last_group() -> None:
    recipe = Recipe(group=64, symmetric=False)
    weight, x = quantized(recipe, inputs=160), x_of(4, 160)
    expected = x @ weight.dequantize().t()
    assert weight.scales.shape[1] == 3
    torch.testing.assert_close(plain(recipe, weight)(x), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(NBitsLinear(weight, 64, None)(x), expected, rtol=1e-5, atol=1e-4)


def test_a_checkpoint_without_order_is_in_sequence() -> None:
    weight = quantized(Recipe())
    parts = packed_toys.parts_of(weight, Recipe())
    del parts["g_idx"]
    layer = packed_linear(stored_as(Recipe()), "layer", parts, CPU, torch.float32)
    x = x_of(4, 160)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().t(), rtol=1e-5, atol=1e-4)


# --- memory


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_plain_layers_bytes_are_as_planned(recipe: Recipe) -> None:
    layer = plain(recipe, quantized(recipe), dtype=torch.float16)
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert held == packed_bytes(stored_as(recipe), 96, 160, "fp16")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (3, 128)])
def test_the_cpus_kernels_hold_what_is_planned(bits: int, group: int) -> None:
    from psutil import Process

    from lowmem.machine.monitor import outside_heap, release_memory

    weight = quantized(Recipe(bits=bits, group=group), 2048, 1024)
    layers = [NBitsLinear(weight, group, None) for _ in range(2)]
    release_memory()
    before = Process().memory_info().rss
    with outside_heap():  # as the loader allocates
        layers += [NBitsLinear(weight, group, None) for _ in range(24)]
    release_memory()
    held = (Process().memory_info().rss - before) / 24
    planned = packed_bytes(Quantization("gptq", bits, group, "gptq"), 2048, 1024, "fp32")
    assert held == pytest.approx(planned, rel=0.05)
    assert planned > 2048 * 1024 / 2 + SESSION_BYTES


# --- what bad files get


def test_shapes_that_contradict_the_config_are_named() -> None:
    stored = stored_as(Recipe())
    shapes = {part: tuple(t.shape) for part, t in packed_toys.parts_of(quantized(Recipe()), Recipe()).items()}
    check_shapes(stored, "layer", 96, 160, shapes)
    with pytest.raises(CorruptModel, match=r"layer\.qweight is \(21, 96\).*GPTQ, 4 bits.*\(20, 96\)"):
        check_shapes(stored, "layer", 96, 160, shapes | {"qweight": (21, 96)})
    with pytest.raises(CorruptModel, match=r"layer\.scales"):
        check_shapes(stored, "layer", 96, 160, shapes | {"scales": (6, 96)})
    with pytest.raises(CorruptModel, match="layer has no qzeros"):
        check_shapes(stored, "layer", 96, 160, {part: s for part, s in shapes.items() if part != "qzeros"})


def test_groups_of_the_wrong_size_and_broken_scales_are_named() -> None:
    parts = packed_toys.parts_of(quantized(Recipe()), Recipe())
    with pytest.raises(CorruptModel, match=r"layer\.g_idx .* 160 inputs"):
        packed_linear(stored_as(Recipe()), "layer", parts | {"g_idx": parts["g_idx"] * 0}, CPU, torch.float32)
    parts["scales"][0, 3] = float("nan")
    with pytest.raises(CorruptModel, match=r"layer\.scales"):
        packed_linear(stored_as(Recipe()), "layer", parts, CPU, torch.float32)


# --- gptqmodel's kernels, by a stand-in


class Kernel(nn.Module):
    """What gptqmodel's layers look like from outside; `shift` makes it compute something else."""

    shift = 0

    def __init__(self, bits: int, in_features: int, out_features: int, bias: bool, **_: object) -> None:
        super().__init__()
        self.bits = bits
        groups = in_features // 32
        for name, shape in {
            "qweight": (in_features * bits // 32, out_features),
            "qzeros": (groups, out_features * bits // 32),
            "g_idx": (in_features,),
        }.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def post_init(self) -> None:
        from lowmem.kernels.packing import from_gptq

        self.dense = from_gptq(dict(self.named_buffers()), self.bits, v2=True).dequantize() + self.shift

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense.t() + (0 if self.bias is None else self.bias)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[Kernel]:
    importer = types.ModuleType("gptqmodel.utils.importer")
    importer.hf_select_quant_linear_v2 = lambda **_: Kernel
    for name in ("gptqmodel", "gptqmodel.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "gptqmodel.utils.importer", importer)
    gptqmodel_kernel._chooser.cache_clear()
    yield Kernel
    gptqmodel_kernel._chooser.cache_clear()


def kernel_like(recipe: Recipe) -> nn.Module | None:
    weight, bias = quantized(recipe), torch.randn(96)
    parts = packed_toys.parts_of(weight, recipe) | {"bias": bias}
    return gptqmodel_kernel.like(plain(recipe, weight, bias), weight, stored_as(recipe), parts, torch.float32)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_kernel_that_agrees_is_used(installed: type[Kernel], layout: str) -> None:
    assert isinstance(kernel_like(Recipe(layout=layout)), installed)


def test_a_kernel_that_computes_something_else_is_not_used(
    installed: type[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "shift", 1)
    assert kernel_like(Recipe()) is None


def test_a_kernel_that_fails_is_not_used(installed: type[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "post_init", lambda _: 1 / 0)
    assert kernel_like(Recipe()) is None


def test_without_gptqmodel_there_is_no_kernel() -> None:
    gptqmodel_kernel._chooser.cache_clear()
    assert kernel_like(Recipe()) is None
