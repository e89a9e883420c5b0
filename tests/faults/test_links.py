"""Links beside a model that lead out of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import toys

from lowmem.errors import UnsafeModel
from lowmem.events import drain
from lowmem.models.source import read_spec, resolve_folder
from lowmem.quant.request import QuantizeRequest
from lowmem.quant.run import quantize

SECRET = "root:x:0:0"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    return toys.save_toy("llama", tmp_path / "model")


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer_config.json", "generation_config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeModel, match=f"{name} of model is a link to a file outside"):
        read_spec(str(model))
    with pytest.raises(UnsafeModel, match="is a link"):
        resolve_folder(model, str(model))


def test_nothing_of_it_reaches_a_result(model: Path, tmp_path: Path) -> None:
    (model / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeModel):
        drain(quantize(QuantizeRequest.validated(str(model), "rtn", {"group_size": 32}, out=tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_within_the_hubs_cache_is_a_model(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--one--toy"
    snapshot = cache / "snapshots" / "0123456"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in model.iterdir():
        file.rename(cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_spec(str(snapshot)).layers
    (snapshot / "merges.txt").symlink_to("../../../secret")
    with pytest.raises(UnsafeModel):
        read_spec(str(snapshot))


def test_a_link_to_the_folder_and_links_within_it_are_fine(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").rename(model / "real.json")
    (model / "tokenizer.json").symlink_to("real.json")
    (tmp_path / "alias").symlink_to(model, target_is_directory=True)
    assert read_spec(str(tmp_path / "alias")).layers
