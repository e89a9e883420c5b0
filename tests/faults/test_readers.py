"""Files that others wrote, damaged or hostile: each is refused in one sentence, or what is optional in it is ignored."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import toys

from faults import fuzz
from lowmem.errors import CorruptModel, LowMemError
from lowmem.events import CancelToken, drain
from lowmem.machine.budget import MemoryBudget
from lowmem.models import derive as derive_module
from lowmem.models.derive import derive
from lowmem.models.generation_config import eos_token_ids, generation_config, generation_fields
from lowmem.models.source import read_spec
from lowmem.models.spec import ModelSource
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime import loader

FUZZ_SECONDS = 60
"""For all readers together."""


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets replace the derivation."""
    for name in ("_derived", "_keep", "_kept"):
        monkeypatch.setattr(derive_module, name, getattr(derive_module, name))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_was_found_stays_mended(name: str) -> None:
    for data in fuzz.corpus(name):
        fuzz.check(name, data)


@pytest.mark.parametrize("names", [[], ["build"]], ids=["readers", "build"])
def test_no_bytes_break_a_reader(names: list[str], tmp_path: Path) -> None:
    """A fresh process, so that its memory can be limited; guided by coverage where atheris is installed.

    The seed is always the same: a build fails for what was changed, and new inputs are looked for by hand.
    """
    command = [sys.executable, "-m", "faults.fuzz", str(FUZZ_SECONDS / 2), *names, "--seed", "1"]
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400)
    crashes = {file.name: file.read_bytes()[:2000] for file in tmp_path.glob("crash-*")}
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}\n{crashes}"
    assert not crashes


DAMAGED: dict[str, tuple[str, Any]] = {
    "an unhashable dtype": ("header_json", {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}),
    "an object as a shape": ("header_json", {"a": {"dtype": "F32", "shape": {"x": 1}, "data_offsets": [0, 8]}}),
    "a side of 10^400": ("header_json", {"a": {"dtype": "F32", "shape": [10**400] * 12, "data_offsets": [0, 8]}}),
    "half a surrogate pair": ("header_json", {"\ud800": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    "a list as an index": ("index", []),
    "a list as a weight map": ("index", {"weight_map": ["a"]}),
    "shards that are lists": ("index", {"weight_map": {"a": ["model.safetensors"]}}),
    "a config that is a list": ("config", []),
    "NaN layers": ("config", fuzz.LLAMA | {"num_hidden_layers": float("nan")}),
    "infinite width": ("config", fuzz.LLAMA | {"hidden_size": float("inf")}),
    "a config without end": ("config", fuzz.LLAMA | {"a": json.loads("[" * 90 + "]" * 90)}),
    "a vocabulary of text": ("tokenizer", {"model": {"vocab": "abc"}}),
    "an infinite id": ("tokenizer", {"model": {"vocab": {"a": float("inf")}}}),
    "a tokenizer that is a list": ("tokenizer", []),
    "templates that are numbers": ("tokenizer_config", {"chat_template": [1, 2]}),
    "a template config that is a list": ("chat_template", []),
    "files that are a list": ("manifest", fuzz.MANIFEST | {"files": ["a"]}),
    "a file of NaN bytes": ("manifest", fuzz.MANIFEST | {"files": {"a": float("nan")}}),
    "a precision of lists": ("exported", fuzz.MANIFEST | {"precision": []}),
    "tensors that are numbers": ("exported", fuzz.MANIFEST | {"model_tensors": [[1, "fp32", None, 4]]}),
    "a dtype that is none": ("exported", fuzz.MANIFEST | {"model_tensors": [["a", "fp7", [1], 4]]}),
    "settings that are a list": ("journal", fuzz.JOURNAL | {"settings": []}),
    "shards without entries": ("journal", fuzz.JOURNAL | {"shards": [{}]}),
    "a record without a fingerprint": ("record", {"files": ""}),
    "a record that is a list": ("record", []),
    "a generation config that is a list": ("generation_config", []),
    "end tokens that are objects": ("generation_config", {"eos_token_id": [{}]}),
    "a listing of texts": ("listing", fuzz.LISTING | {"siblings": ["a"]}),
    "a listing of infinite sizes": ("listing", fuzz.LISTING | {"siblings": [{"rfilename": "a", "size": float("inf")}]}),
    "codes without sides": ("encoded", {"tensors": {"a_blocks": ["uint8", []], "a_scales": ["uint8", []]}, "described": {}}),
    "codes of 0 bits": (
        "encoded",
        fuzz.PACKED | {"described": {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 64}}}}},
    ),
    "a pattern without end": (
        "encoded",
        fuzz.PACKED | {"described": fuzz.GPTQ | {"dynamic": {"((.+)+)+!": {"bits": 8}}}},
    ),
    "rows of text": ("results", fuzz.RESULTS | {"rows": ["fp32"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_broke_a_reader(case: str) -> None:
    name, value = DAMAGED[case]
    fuzz.check(name, json.dumps(value).encode())


@pytest.mark.parametrize("key", ["general.alignment", "llama.block_count", "llama.rope.scaling.factor", "split.count"])
def test_gguf_metadata_of_another_type(key: str) -> None:
    for value in ("x" * 5000, ["a", "b"], float("nan"), float("inf"), -2.0):
        fuzz.check("gguf", fuzz.gguf(**{key: value}))


def test_a_gguf_text_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    data = fuzz.gguf(0)
    path = tmp_path / "toy.gguf"
    start = data.index(b"llama.rope.scaling.type") + len("llama.rope.scaling.type") + 4
    with path.open("wb") as file:
        file.write(data[:start] + (3 << 30).to_bytes(8, "little"))
        file.truncate(4 << 30)  # sparse
    before = psutil.Process().memory_info().rss
    with pytest.raises(CorruptModel, match="header of more than"):
        read_spec(str(path))
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


# --- numbers of a configuration


@pytest.fixture
def underived(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive_module, "_derived", lambda *_: pytest.fail("built before it was checked"))


SIZES: dict[str, dict[str, Any]] = {
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "more layers than tensors": {"num_hidden_layers": 1 + len(fuzz.stored())},
    "n_layer": {"n_layer": 10**5},
    "text_config": {"text_config": {"num_hidden_layers": 10**5}},
    "vision_config": {"vision_config": {"num_hidden_layers": 10**5}},
    "num_experts": {"num_experts": 10**7},
    "n_routed_experts": {"n_routed_experts": 10**7},
    "num_attention_heads": {"num_attention_heads": 10**9},
    "num_key_value_heads": {"num_key_value_heads": 10**9},
    "head_dim": {"head_dim": 10**9},
    "hidden_size": {"hidden_size": 10**9},
    "intermediate_size": {"intermediate_size": [64, 10**9]},
    "vocab_size": {"vocab_size": 10**9},
    "anything of 10^400": {"rope_theta": 10**400},
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.usefixtures("underived")
def test_numbers_are_held_against_the_tensors_before_anything_is_built(case: str) -> None:
    files = fuzz.InMemory(config__json=fuzz.text(fuzz.LLAMA | SIZES[case]), model__safetensors=fuzz.WEIGHTS)
    with pytest.raises(CorruptModel, match=r"config\.json of toy (has|names)"):
        fuzz.describe.describe(files, ModelSource("acme/toy", "toy"))


@pytest.mark.usefixtures("underived")
def test_layers_of_a_gguf_file_are_held_against_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(fuzz.gguf(**{"llama.block_count": 10**9}))
    with pytest.raises(CorruptModel, match="layers"):
        read_spec(str(tmp_path / "toy.gguf"))


@pytest.mark.parametrize("name", toys.NAMES)
def test_sound_configurations_pass(name: str, tmp_path: Path) -> None:
    assert read_spec(str(toys.save_toy(name, tmp_path))).layers == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
def test_what_passes_is_built_within_limits_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of sines of a GPT-J of 4 * 10^9 positions takes 32 GB and more, which no tensor of the file tells."""
    monkeypatch.setattr(derive_module, "IN_PROCESS", False)
    config = {"model_type": "gptj", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 4 * 10**9, "vocab_size": 9}
    with pytest.raises(CorruptModel, match="cannot be built even without weights"):
        derive(config, "toy", None, "fp16")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's time")
def test_what_passes_is_built_within_limits_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive_module, "IN_PROCESS", False)
    monkeypatch.setattr(derive_module, "TIMEOUT_SECONDS", 3)
    started = time.monotonic()
    with pytest.raises(LowMemError, match="longer than 3 s"):
        derive(fuzz.LLAMA | {"num_hidden_layers": 10**6}, "toy", None, "fp16")
    assert time.monotonic() - started < 30


# --- generation_config.json


@pytest.mark.parametrize(
    "damage", ["", "[]", "{ not json", '{"eos_token_id": {"a": 1}}', '{"do_sample": {}}', '{"watermarking_config": 3}']
)
def test_a_damaged_generation_config_is_ignored(damage: str, tmp_path: Path, made_up: Any) -> None:
    folder = toys.save_toy("llama", tmp_path / "toy")
    (folder / "generation_config.json").write_text(damage)
    hardware = made_up()
    chosen = plan(
        read_spec(str(folder)),
        hardware,
        MemoryBudget.detect(hardware),
        Goal(context=64, precision="fp32", backend="torch"),
    )
    loaded = drain(loader.load(chosen, folder, CancelToken()))
    assert loaded.model.generation_config is not None
    loaded.close()


def test_of_a_generation_config_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, null], "suppress_tokens": "x", "top_k": 3}')
    assert generation_fields(tmp_path) == {"eos_token_id": [2, None], "top_k": 3}
    assert generation_config(tmp_path).top_k == 3
    assert eos_token_ids(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text("[]")
    assert eos_token_ids(tmp_path) == [5]
