"""Tensors read from disk equal those written, whatever the dtype, layout or slab; nothing is mapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

from lowmem.errors import CorruptModel, LowMemError  # noqa: E402
from lowmem.models import checkpoint as checkpoint_module  # noqa: E402
from lowmem.models.checkpoint import TORCH_DTYPES, Checkpoint  # noqa: E402
from lowmem.models.checkpoint_writer import write_shards  # noqa: E402
from lowmem.models.source import read_spec  # noqa: E402
from lowmem.models.spec import DTYPE_BYTES  # noqa: E402
from lowmem.models.synthetic import write_random_model  # noqa: E402

SIZES = {"layers": 2, "hidden": 16, "intermediate": 32, "heads": 4, "kv_heads": 2, "vocab": 40, "context": 64}


def samples() -> dict[str, torch.Tensor]:
    noise = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    tensors = {name: (noise * 10).to(dtype) for name, dtype in TORCH_DTYPES.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "cube": noise.reshape(5, 37, 1).half()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    save_file(samples(), tmp_path / "m" / "model.safetensors")
    return tmp_path / "m"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(checkpoint_module.as_bytes(a)) == bytes(checkpoint_module.as_bytes(b))
    )


def test_every_dtype_reads_back_bit_for_bit(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(samples())
        for name, tensor in samples().items():
            assert same(checkpoint.read(name), tensor), name
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)


def test_dtype_sizes_of_plans_are_torchs() -> None:
    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == DTYPE_BYTES


@pytest.mark.parametrize("slab", [1, 7, 100, 10**6])
def test_conversion_in_slabs_equals_one_at_once(folder: Path, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "CONVERSION_BYTES", slab)
    with Checkpoint(folder) as checkpoint:
        for name in ("bf16", "fp16", "fp32", "scalar", "empty", "cube"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert same(checkpoint.read(name, dtype), samples()[name].to(dtype)), (name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reading_into_a_transposed_destination(folder: Path, dtype: torch.dtype) -> None:
    out = torch.empty(5, 37, dtype=dtype).t()
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.read_into("bf16", out) is out
        assert torch.equal(out, samples()["bf16"].to(dtype))
        with pytest.raises(ValueError, match="destination"):
            checkpoint.read_into("bf16", torch.empty(37, 6))


def test_without_positioned_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.preadv")
    with Checkpoint(folder) as checkpoint:
        assert same(checkpoint.read("fp32"), samples()["fp32"])


def test_a_file_that_changes_after_opening(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with Checkpoint(folder) as checkpoint:
        with file.open("r+b") as out:
            out.truncate(size - 1)
        with pytest.raises(CorruptModel, match=rf"model\.safetensors changed .*{size:,} bytes and has {size - 1:,}"):
            checkpoint.read("fp32")


def test_close_is_idempotent_and_a_bad_folder_leaves_nothing_open(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.close()
    checkpoint.close()
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptModel):
        Checkpoint(folder)


def test_written_files_are_what_the_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = write_shards(tmp_path, iter(samples().items()))
    assert path.stat().st_size == size
    loaded = load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in samples().items())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failing_source_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(3)
        raise LowMemError("enough")

    with pytest.raises(LowMemError, match="enough"):
        write_shards(tmp_path, failing())
    with pytest.raises(ValueError, match="two tensors"):
        write_shards(tmp_path, [("a", torch.ones(1))] * 2)
    assert list(tmp_path.iterdir()) == []


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    tensors = {f"w{number}": torch.full((10,), float(number)) for number in range(7)}
    write_shards(tmp_path, iter(tensors.items()), shard_bytes=90)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == list(tensors)
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, [("w", torch.ones(2))])
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_random_model_loads_in_transformers_and_matches_its_spec(dtype: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    spec = write_random_model(tmp_path / "m", **SIZES, dtype=dtype, tied=tied)
    read = read_spec(str(tmp_path / "m"))
    assert (read.tensors, read.parameters, read.tied) == (spec.tensors, spec.parameters, tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert sum(p.numel() for p in model.parameters()) == spec.parameters
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()
    weight = model.model.layers[1].mlp.up_proj.weight.float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_random_models_repeat_by_seed_and_take_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    (tmp_path / "from" / "config.json").write_text("not copied")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, **SIZES, seed=seed, tokenizer_from=tmp_path / "from")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert (tmp_path / "a" / "config.json").read_text() != "not copied"


def test_a_pool_is_repeated_seamlessly() -> None:
    from lowmem.models.synthetic import _window

    pool = torch.arange(5)
    assert _window(pool, 3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
