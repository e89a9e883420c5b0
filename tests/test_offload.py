"""Offloaded models compute what resident ones compute, and say clearly when their files are taken away."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowmem.errors import BadInput, CorruptModel, ModelNotFound
from lowmem.kernels import stored_layers as layers
from lowmem.machine.direct_io import PAGE
from lowmem.planning.placement import Placement, chosen, spread
from lowmem.runtime.streaming.attach import Offloaded, apply
from lowmem.runtime.streaming.blocks import extents
from lowmem.runtime.streaming.transfer import Host, OnDevice

DISK = Placement(("disk", "disk"))
PROMPT = torch.tensor([toys.prompt(24)])


@pytest.fixture(params=toys.NAMES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def resident(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it: in the layout that the file has."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PROMPT).logits


@pytest.mark.parametrize("mapped", [False, True])
def test_from_disk_bit_for_bit_and_back(family: str, tmp_path: Path, mapped: bool) -> None:
    model = resident(toys.save_toy(family, tmp_path))
    expected = logits(model)
    offloaded = apply(model, tmp_path, Placement(("disk", "disk"), mapped))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    offloaded.remove()
    assert torch.equal(logits(model), expected)
    assert all(parameter.untyped_storage().nbytes() > 4 for parameter in model.parameters())


def test_streamed_blocks_hold_no_memory(tmp_path: Path) -> None:
    model = resident(toys.save_toy("llama", tmp_path))
    offloaded = apply(model, tmp_path, chosen(all_resident(model), "disk", [1]))
    held = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
    assert all((nbytes == 4) == (".layers.1." in name) for name, nbytes in held.items())
    assert model.num_parameters() == toys.toy("llama").num_parameters()
    assert sum(block.stored_bytes for block in offloaded.streamer.blocks) == sum(
        tensor.nbytes for name, tensor in load_file(tmp_path / "model.safetensors").items() if ".layers.1." in name
    )


def all_resident(model: PreTrainedModel) -> Placement:
    return Placement(("ram",) * model.config.num_hidden_layers)


def on_fake_device(model: PreTrainedModel, offloaded: Offloaded, ram: list[int]) -> None:
    """Route the model's blocks through device buffers, as on a GPU."""
    files = list(offloaded.streamer.blocks)
    offloaded.streamer.source.close()
    host = Host([f for f in files if f.index in ram], [f for f in files if f.index not in ram], pinned=False)
    offloaded.streamer.source = OnDevice(host, files, torch.device("cpu"))


@pytest.mark.parametrize("ram", [[], [0], [0, 1]])
def test_from_ram_and_disk_through_device_buffers(family: str, ram: list[int], tmp_path: Path) -> None:
    model = resident(toys.save_toy(family, tmp_path))
    expected = logits(model)
    offloaded = apply(model, tmp_path, DISK)
    on_fake_device(model, offloaded, ram)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    offloaded.streamer.close()


def deep_toy(folder: Path, layers: int = 5) -> PreTrainedModel:
    """A Llama whose blocks are read several times around the ring, and whose sizes differ."""
    config = toys.config("llama")
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    return resident(folder)


def test_a_pass_that_breaks_off_does_not_harm_the_next(tmp_path: Path) -> None:
    model = deep_toy(tmp_path)
    expected = logits(model)
    offloaded = apply(model, tmp_path, Placement(("disk", "ram", "disk", "disk", "disk")))

    def stop(*_: object) -> None:
        raise InterruptedError

    for block in (0, 2, 4):
        handle = model.model.layers[block].mlp.register_forward_pre_hook(stop)
        with pytest.raises(InterruptedError):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)
    offloaded.remove()


def test_shards_and_large_gaps(tmp_path: Path) -> None:
    """Blocks lie in several files, their tensors far apart and in any order."""
    model = deep_toy(tmp_path)
    expected = logits(model)
    tensors = load_file(tmp_path / "model.safetensors")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "old")
    names = sorted(tensors, key=lambda name: name[::-1])
    parts = [names[0::2], names[1::2]]
    parts[1] = parts[1][-2:] + parts[1][:-2]
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        padding = {f"{name}.masked_bias": torch.zeros(100_000, dtype=torch.uint8) for name in part[:3]}
        save_file({name: tensors[name] for name in part} | padding, tmp_path / file, {"format": "pt"})
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    offloaded = apply(model, tmp_path, Placement(("disk",) * 5))
    assert torch.equal(logits(model), expected)
    for block in offloaded.streamer.blocks:
        sizes = {file: (tmp_path / file).stat().st_size for file in files}
        assert all(read.offset + read.needed <= sizes[read.file.name] for read in block.reads)
        assert block.nbytes < block.stored_bytes + 2 * PAGE * len(block.weights)


@pytest.fixture(params=[False, True], ids=["past the cache", "in place"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[PreTrainedModel, Path]]:
    """A model that streams all of its blocks, and its weight file; large enough for a read to be under way."""
    model = deep_toy(tmp_path)
    offloaded = apply(model, tmp_path, Placement(("disk",) * 5, mapped=request.param))
    logits(model)
    yield model, tmp_path / "model.safetensors"
    offloaded.streamer.close()


def passes(model: PreTrainedModel) -> None:
    """Enough for blocks that were read ahead not to be the last."""
    for _ in range(3):
        logits(model)


def test_a_truncated_file_is_named(running: tuple[PreTrainedModel, Path]) -> None:
    model, file = running
    size = file.stat().st_size
    os.truncate(file, size // 2)
    with pytest.raises(
        CorruptModel, match=rf"changed while the model ran: it had {size:,} bytes and has {size // 2:,}"
    ):
        passes(model)
    with pytest.raises(CorruptModel):
        logits(model)


def test_a_replaced_shard_is_named(running: tuple[PreTrainedModel, Path]) -> None:
    model, file = running
    shutil.copyfile(file, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    with pytest.raises(CorruptModel, match="was replaced while the model ran"):
        passes(model)


def test_a_disk_that_is_gone_is_named(running: tuple[PreTrainedModel, Path]) -> None:
    model, file = running
    away = file.rename(file.with_name("elsewhere"))
    with pytest.raises(ModelNotFound, match="no longer exists"):
        passes(model)
    away.rename(file)
    logits(model)


def test_two_models_stream_from_one_folder(tmp_path: Path) -> None:
    first, second = deep_toy(tmp_path), resident(tmp_path)
    expected = logits(first)
    for model in (first, second):
        apply(model, tmp_path, Placement(("disk",) * 5))
    for model in (first, second, first):
        assert torch.equal(logits(model), expected)


def test_no_block_to_move_is_said(tmp_path: Path) -> None:
    model = deep_toy(tmp_path)
    with pytest.raises(BadInput):
        apply(model, tmp_path, Placement(("ram",) * 5))


def test_other_weights_than_the_folders_are_noticed(tmp_path: Path) -> None:
    model = deep_toy(tmp_path)
    model.model.layers[3].input_layernorm.weight += 0.5
    with pytest.raises(CorruptModel, match="input_layernorm"):
        apply(model, tmp_path, Placement(("disk",) * 5))


def test_reads_are_whole_pages_and_cover_every_byte(tmp_path: Path) -> None:
    model = deep_toy(tmp_path)
    offloaded = apply(model, tmp_path, Placement(("disk",) * 5))
    for block in offloaded.streamer.blocks:
        assert block.stored_bytes <= block.nbytes < block.stored_bytes + 2 * PAGE
        for read in block.reads:
            assert read.offset % PAGE == read.length % PAGE == read.position % PAGE == 0
        content = bytearray(block.nbytes)
        file = (tmp_path / "model.safetensors").read_bytes()
        for read in block.reads:
            content[read.position : read.position + read.needed] = file[read.offset : read.offset + read.needed]
        for weight in block.weights:
            (extent,) = extents(weight.entry)
            stored = file[extent.offset : extent.offset + extent.nbytes]
            assert content[weight.positions[0] : weight.positions[0] + extent.nbytes] == stored


def test_blocks_at_home_are_spread() -> None:
    assert spread(3, 9) == (0, 3, 6)
    assert spread(0, 9) == ()
    assert spread(4, 4) == (0, 1, 2, 3)


def test_what_the_cpu_multiplies_out_is_what_the_layer_stands_for() -> None:
    """Stored in 16 bits, either way round, in tiles that do not divide the layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 40, generator=generator).bfloat16()
    x = torch.randn(3, 5, 40, generator=generator)
    expected = torch.nn.functional.linear(x, weight.float())
    torch.testing.assert_close(layers.StoredLinear(weight, None)(x), expected)
    torch.testing.assert_close(layers.StoredLinear(weight.t().contiguous(), None, transposed=True)(x), expected)
