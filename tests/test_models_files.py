"""Headers, folders and references: what is read before any weight, and every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from conftest import machine
from safetensors.torch import load_file, save_file

from lowmem.errors import BadInput, CorruptModel, LowMemError, ModelNotFound, UnsafeModel, Unsupported
from lowmem.events import CancelToken, drain
from lowmem.machine.budget import MemoryBudget
from lowmem.models import convert_gguf
from lowmem.models.files import LocalFile
from lowmem.models.gguf_file import TYPES, read_gguf
from lowmem.models.model_files import MANIFEST
from lowmem.models.reference import parse_ref
from lowmem.models.safetensors_header import read_header
from lowmem.models.source import (
    folder_name,
    gguf_fingerprint,
    is_current,
    is_local,
    local_folder,
    local_models,
    read_spec,
    resolve_folder,
)
from lowmem.models.spec import ModelSource
from lowmem.models.synthetic import write_random_model
from lowmem.models.tokenizer_files import check_tokenizer, vocabulary_size
from lowmem.planning.goal import Goal
from lowmem.planning.planner import plan
from lowmem.runtime import loader
from lowmem.settings import settings

SIZES = {"layers": 2, "hidden": 16, "intermediate": 32, "heads": 4, "kv_heads": 2, "vocab": 40, "context": 64}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    write_random_model(folder, **SIZES)
    write_tokenizer(folder, 40)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    vocabulary = {f"t{number}": number for number in range(size)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def safetensors(header: object, data: bytes, path: Path, length: int | None = None) -> LocalFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return LocalFile(path)


# --- safetensors


def test_header_as_the_library_writes_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "b": torch.ones(3, 4, dtype=torch.bfloat16),
        "a": torch.zeros(5),
        "s": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    header = read_header(LocalFile(tmp_path / "x.safetensors"))
    assert {t.name: (t.dtype, t.shape, t.nbytes) for t in header.tensors} == {
        "b": ("bf16", (3, 4), 24),
        "a": ("fp32", (5,), 20),
        "s": ("int64", (), 8),
        "none": ("fp32", (0, 3), 0),
    }
    assert header.metadata == {"format": "pt"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert raw[header.offsets["s"] :][:8] == (7).to_bytes(8, "little")


def entry(begin: int, end: int, shape: list[object] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry(0, 16)}, b"\0" * 12, "truncated"),
        ({"w": entry(0, 16)}, b"\0" * 20, "4 bytes that belong to no tensor"),
        ({"w": entry(0, 16), "v": entry(8, 16)}, b"\0" * 16, "overlaps"),
        ({"w": entry(0, 8), "v": entry(12, 16)}, b"\0" * 16, "gap"),
        ({"w": entry(0, 16, [5])}, b"\0" * 16, r"needs 20"),
        ({"w": entry(0, 16, [-4])}, b"\0" * 16, "not counts"),
        ({"w": entry(0, 16, [4.0])}, b"\0" * 16, "not counts"),
        ({"w": {"dtype": "F32"}}, b"", "without dtype, shape and data_offsets"),
        ({"w": 3}, b"", "without dtype, shape and data_offsets"),
        (b"{not json", b"", "not JSON"),
        (b"[" * 50_000, b"", "not JSON"),
        ([1], b"", "not a JSON object"),
    ],
)
def test_unsound_safetensors(header: object, data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=words) as caught:
        read_header(safetensors(header, data, tmp_path / "model.safetensors"))
    assert "model.safetensors" in caught.value.message


@pytest.mark.parametrize(("length", "words"), [(10_000, "10,008"), (2**60, "100,000,000")])
def test_header_length_beyond_the_file(length: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptModel, match=words):
        read_header(safetensors({}, b"", tmp_path / "m.safetensors", length))


def test_short_file_and_unknown_dtype(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"abc")
    with pytest.raises(CorruptModel, match="3 bytes"):
        read_header(LocalFile(tmp_path / "m.safetensors"))
    with pytest.raises(Unsupported, match="F3_E1"):
        read_header(safetensors({"w": entry(0, 4, dtype="F3_E1")}, b"\0" * 4, tmp_path / "m.safetensors"))


# --- GGUF


def write_gguf(path: Path, arch: str = "llama", head: bool = False) -> None:
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "b", "ccc"])
    writer.add_array("toy.numbers", [1, 2, 3])
    writer.add_chat_template("{{ messages }}")
    names = ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.strange.weight"] + ["output.weight"] * head
    for name in names:
        rows = numpy.ones((3, 64), dtype=numpy.float32)
        if name == "blk.0.attn_q.weight":
            packed = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(name, rows.astype(numpy.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_header(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf")
    spec = read_spec(str(tmp_path / "toy.gguf"))
    assert (spec.model_type, spec.layers, spec.hidden, spec.intermediate) == ("llama", 1, 64, 96)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.vocab, spec.context) == (4, 2, 16, 3, 128)
    assert (spec.tied, spec.has_chat_template, spec.name) == (True, True, "toy")
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in spec.tensors] == [
        ("model.embed_tokens.weight", "fp16", (3, 64), 384),
        ("model.layers.0.self_attn.q_proj.weight", "q4_1", (64, 64), 120),
    ]
    assert is_local(str(tmp_path / "toy.gguf"))
    assert local_folder(str(tmp_path / "toy.gguf")) is None


def test_gguf_with_its_own_output_embedding_is_not_tied(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", head=True)
    assert not read_spec(str(tmp_path / "toy.gguf")).tied


def test_gguf_block_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for kind, (name, block, size) in TYPES.items():
        theirs = gguf.GGMLQuantizationType(kind)
        assert gguf.GGML_QUANT_SIZES[theirs] == (block, size), name


def test_a_failed_conversion_is_one_sentence_and_its_exception_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> Generator[None, None, tuple[int, str]]:
        yield
        return 1, "ValueError: cannot reshape array of size 3"

    monkeypatch.setattr(convert_gguf, "run_child", failing)
    write_gguf(tmp_path / "toy.gguf")
    with pytest.raises(CorruptModel) as caught:
        list(convert_gguf.convert(tmp_path / "toy.gguf", tmp_path / "out", CancelToken()))
    assert caught.value.message == "toy.gguf cannot be converted: its weights could not be read."
    assert "cannot reshape" in caplog.text


def test_unsound_gguf(tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"
    write_gguf(path)
    whole = path.read_bytes()
    for length in (0, 3, 20, 30, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptModel, match=r"toy\.gguf"):
            read_spec(str(path))
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + whole[8:])
    with pytest.raises(Unsupported, match="version 1"):
        read_gguf(LocalFile(path))
    path.write_bytes(whole[:8] + b"\xff" * 8 + whole[16:])
    with pytest.raises(CorruptModel, match="tensors"):
        read_gguf(LocalFile(path))


def test_gguf_of_an_architecture_that_cannot_be_converted(tmp_path: Path) -> None:
    write_gguf(tmp_path / "toy.gguf", arch="rwkv6")
    with pytest.raises(Unsupported, match="rwkv6"):
        read_spec(str(tmp_path / "toy.gguf"))


# --- folders


def test_local_folder_is_read_exactly(toy: Path) -> None:
    spec = read_spec(str(toy))
    assert (spec.layers, spec.hidden, spec.kv_heads, spec.head_dim, spec.vocab) == (2, 16, 2, 4, 40)
    assert spec.size_on_disk == (toy / "model.safetensors").stat().st_size
    assert spec.name == "toy"
    assert not spec.tied
    assert not spec.has_chat_template
    assert local_folder(str(toy)) == toy
    assert is_local(str(toy))


def test_sampling_options_of_a_folder(toy: Path) -> None:
    assert read_spec(str(toy)).sampling == ()
    (toy / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "top_p": "high", "do_sample": true}')
    assert read_spec(str(toy)).sampling == (("temperature", 0.6), ("top_k", 20))
    (toy / "generation_config.json").write_text("[]")
    assert read_spec(str(toy)).sampling == ()


def test_sharded_folder_equals_the_single_file(toy: Path, tmp_path: Path) -> None:
    write_random_model(tmp_path / "shards", **SIZES, shard_bytes=2000)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2
    spec = read_spec(str(tmp_path / "shards"))
    assert spec.tensors == read_spec(str(toy)).tensors
    shards[1].unlink()
    with pytest.raises(CorruptModel, match=shards[1].name):
        read_spec(str(tmp_path / "shards"))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ".safetensors"]
)
def test_index_that_names_a_strange_file(name: str, toy: Path) -> None:
    (toy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CorruptModel, match="names the file"):
        read_spec(str(toy))


def _logits(folder: Path) -> torch.Tensor:
    goal = Goal(context=64, precision="fp32")
    planned = plan(read_spec(str(folder)), machine(ram_gb=16), MemoryBudget(ram=4_000_000_000), goal)
    return drain(loader.load(planned, folder, CancelToken())).model(torch.tensor([[1, 2, 3]])).logits


@pytest.mark.parametrize(
    "kind", ["other name", "subfolder", "no index", "other index", "index with a head", "side by side"]
)
def test_weights_under_names_of_other_tools(kind: str, tmp_path: Path) -> None:
    folder, whole = tmp_path / "m", "model.safetensors"
    toys.save_toy("llama", folder)
    expected, size = _logits(folder), read_spec(str(folder)).size_on_disk
    tensors = load_file(folder / whole)
    index = folder / "model.safetensors.index.json"
    if kind == "other name":
        (folder / whole).rename(folder / "gptq_model-4bit-128g.safetensors")
    elif kind == "side by side":
        shutil.copy(folder / whole, folder / "consolidated.safetensors")
    else:
        (folder / whole).unlink()
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        if kind == "subfolder":
            (folder / "weights").mkdir()
            names = [f"weights/{name}" for name in names]
        places = {name: names[number % 2] for number, name in enumerate(tensors)}
        for file in names:
            save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
        if kind == "other index":
            index = folder / "vicuna.safetensors.index.json"
        if kind == "index with a head":
            places |= {"output.weight": names[0]}
        if kind != "no index":
            index.write_text(json.dumps({"weight_map": places}))
    assert read_spec(str(folder)).size_on_disk == pytest.approx(size, rel=0.05)
    assert torch.equal(_logits(folder), expected)


def test_index_that_promises_a_tensor_too_many(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m", **SIZES, shard_bytes=2000)
    path = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptModel, match=r"model\.ghost\.weight"):
        read_spec(str(tmp_path / "m"))


def test_tied_when_no_output_embedding_is_stored(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m", **SIZES, tied=True)
    edit_config(tmp_path / "m", tie_word_embeddings=False)
    assert read_spec(str(tmp_path / "m")).tied


def test_quantization_and_chat_template_are_noticed(toy: Path) -> None:
    edit_config(toy, quantization_config={"quant_method": "gptq", "bits": 4})
    (toy / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    spec = read_spec(str(toy))
    assert (spec.quantization, spec.has_chat_template) == ("gptq", True)


def replace_weights(toy: Path, name: str, data: bytes) -> None:
    (toy / "model.safetensors").unlink()
    (toy / name).write_bytes(data)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_only(name: str, toy: Path) -> None:
    replace_weights(toy, name, pickle.dumps({"w": 1}))
    with pytest.raises(UnsafeModel, match=name) as caught:
        read_spec(str(toy))
    assert "safetensors" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("README.md", ModelNotFound, "no weights"),
        ("model.gguf", ModelNotFound, "GGUF"),
        ("adapter_model.safetensors", Unsupported, "LoRA"),
        ("model-00001-of-00002.safetensors", CorruptModel, "index"),
    ],
)
def test_config_without_usable_weights(name: str, kind: type[LowMemError], words: str, toy: Path) -> None:
    replace_weights(toy, name, b"x")
    with pytest.raises(kind, match=words):
        read_spec(str(toy))


def test_remote_code_and_encoders_are_refused(toy: Path) -> None:
    edit_config(toy, model_type="novel", auto_map={"AutoModelForCausalLM": "modeling_novel.Novel"})
    with pytest.raises(UnsafeModel, match="novel"):
        read_spec(str(toy))
    edit_config(toy, model_type="bert", auto_map=None)
    with pytest.raises(Unsupported, match="encoder"):
        read_spec(str(toy))


def test_truncated_weights_name_the_file_and_the_sizes(toy: Path) -> None:
    file = toy / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as out:
        out.truncate(size - 100)
    with pytest.raises(CorruptModel, match=rf"model\.safetensors is truncated: it has {size - 100:,}.* {size:,}"):
        read_spec(str(toy))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}'])
def test_config_that_is_no_configuration(text: str, toy: Path) -> None:
    (toy / "config.json").write_text(text)
    with pytest.raises(CorruptModel, match=r"config\.json"):
        read_spec(str(toy))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no folder"):
        read_spec(str(tmp_path / "absent"))
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        read_spec(f"{tmp_path}/")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelNotFound, match=r"notes\.txt"):
        read_spec(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelNotFound, match=r"absent\.gguf"):
        read_spec(str(tmp_path / "absent.gguf"))


# --- tokenizers


def test_tokenizer_that_fits(toy: Path) -> None:
    check_tokenizer(toy, read_spec(str(toy)))
    assert vocabulary_size(toy) == 40


@pytest.mark.parametrize("vocabulary", [{"a": 41}, [["t", 0.0]] * 42])
def test_tokenizer_of_another_model(vocabulary: object, toy: Path) -> None:
    (toy / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(CorruptModel, match="42 tokens, the model 40"):
        check_tokenizer(toy, read_spec(str(toy)))


def test_absent_and_broken_tokenizers(toy: Path) -> None:
    spec = read_spec(str(toy))
    (toy / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptModel, match=r"tokenizer\.json"):
        check_tokenizer(toy, spec)
    (toy / "tokenizer.json").unlink()
    with pytest.raises(CorruptModel, match="no tokenizer"):
        check_tokenizer(toy, spec)
    (toy / "tokenizer.model").write_bytes(b"sentencepiece")
    check_tokenizer(toy, spec)


# --- references


@pytest.mark.parametrize(
    ("text", "kind", "repo", "revision", "file"),
    [
        ("demo", "demo", "", "main", ""),
        (" Qwen/Qwen3-0.6B ", "hub", "Qwen/Qwen3-0.6B", "main", ""),
        ("gpt2", "hub", "gpt2", "main", ""),
        ("a/b@refs/pr/1", "hub", "a/b", "refs/pr/1", ""),
        ("acme/toy-GGUF/toy.Q4_1.gguf@abc", "hub_gguf", "acme/toy-GGUF", "abc", "toy.Q4_1.gguf"),
    ],
)
def test_references(text: str, kind: str, repo: str, revision: str, file: str) -> None:
    reference = parse_ref(text, allow_paths=False)
    assert (reference.kind, reference.repo, reference.revision, reference.file) == (kind, repo, revision, file)


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "a b", "a/../b", "a/b/c", "-x/y", "x/y-", "x--y/z", "a\nb", "a\0b", "x" * 500),
        *("http://a/b", "a/b@", "@x", "ä/b", None, 3),
        *("/etc", "../x", "~/x", "./x", "/etc/passwd", "C:\\x", "x.gguf", "/x.gguf"),
    ],
)
def test_what_strangers_may_not_type(text: object) -> None:
    with pytest.raises(BadInput) as caught:
        parse_ref(text, allow_paths=False)  # type: ignore[arg-type]
    assert caught.value.hint


def test_paths(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_ref(str(toy)).path == toy
    monkeypatch.chdir(toy.parent)
    assert parse_ref("toy").kind == "folder"
    assert parse_ref("toy", allow_paths=False).kind == "hub"
    assert parse_ref("./x.gguf").kind == "gguf"


def test_strangers_may_use_our_own_folders_but_not_leave_them(tmp_path: Path) -> None:
    inside = settings().outputs / "mine"
    write_random_model(inside, **SIZES)
    assert parse_ref(str(inside), allow_paths=False).path == inside
    assert read_spec(str(inside), allow_paths=False).layers == 2
    (settings().outputs / "link").symlink_to(tmp_path)
    for text in (f"{inside}/../../..", str(settings().outputs / "link" / "x")):
        with pytest.raises(BadInput, match="outside"):
            parse_ref(text, allow_paths=False)


def test_local_models_lists_finished_folders() -> None:
    assert local_models() == []
    write_random_model(settings().models / "acme--toy@abc", **SIZES)
    (settings().models / "acme--toy@abc" / "source.json").write_text(
        json.dumps({"ref": "acme/toy", "revision": "main"})
    )
    write_random_model(settings().models / "acme--half@abc.part", **SIZES)
    write_random_model(settings().outputs / "mine", **SIZES)
    models = local_models()
    assert [(model.ref, model.name) for model in models] == [
        (str(settings().outputs / "mine"), "mine"),
        ("acme/toy", "toy"),
    ]
    assert models[0].size == (settings().outputs / "mine" / "model.safetensors").stat().st_size
    assert local_folder("acme/toy") == settings().models / "acme--toy@abc"
    assert local_folder("acme/toy@other") is None
    assert read_spec("acme/toy").ref == "acme/toy"


def test_an_older_commit_and_a_lost_origin_are_named_by_their_folder() -> None:
    for commit, ref in (("old", "acme/toy"), ("new", "acme/toy"), ("gone", "/nowhere/x.gguf")):
        folder = settings().models / f"acme--toy@{commit}"
        write_random_model(folder, **SIZES)
        (folder / "source.json").write_text(json.dumps({"ref": ref, "revision": "main" if ref == "acme/toy" else ""}))
    os.utime(settings().models / "acme--toy@old", (1, 1))
    named = {model.folder.name: model.ref for model in local_models()}
    assert named["acme--toy@new"] == "acme/toy"
    assert named["acme--toy@old"] == str(settings().models / "acme--toy@old")
    assert named["acme--toy@gone"] == str(settings().models / "acme--toy@gone")


def grown(path: Path) -> None:
    """Change a file and its time."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b"llama", b"llamb", 1) if path.suffix == ".json" else data + b"0")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_changed_folder_is_read_again(tmp_path: Path, name: str) -> None:
    spec = read_spec(str(toys.save_toy("llama", tmp_path / "toy")))
    assert is_current(spec.source)
    grown(tmp_path / "toy" / name)
    assert not is_current(spec.source)
    shutil.rmtree(tmp_path / "toy")
    assert not is_current(spec.source)


def test_a_changed_gguf_file_is_read_again_before_and_after_its_conversion(tmp_path: Path) -> None:
    path = tmp_path / "toy.gguf"
    path.write_bytes(b"GGUF and more")
    reference = parse_ref(str(path))
    source = ModelSource(str(path), "toy", fingerprint=gguf_fingerprint(reference))
    assert is_current(source)
    converted = settings().models / folder_name(reference)
    toys.save_toy("llama", converted)
    assert not is_current(source), "there is a folder now"
    source = resolve_folder(converted, str(path))
    assert is_current(source)
    grown(path)
    assert not is_current(source), "the folder is that of another file"
    path.unlink()
    assert not is_current(replace(source, folder=None, fingerprint="of the file"))


def test_an_exported_folder_is_read_again_when_its_manifest_changed(tmp_path: Path) -> None:
    folder = toys.save_toy("llama", tmp_path / "graph")
    (folder / MANIFEST).write_text("{}")
    source = resolve_folder(folder, str(folder))
    assert is_current(source)
    (folder / MANIFEST).write_text('{"precision": "int8"}')
    assert not is_current(source)
