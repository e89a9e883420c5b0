"""Fuzzing of every reader of a format that others write.

    PYTHONPATH=tests python -m faults.fuzz SECONDS [READER ...]

Guided by coverage where atheris is installed (Linux, x86-64), which grows `corpus/TARGET`; else what is in the corpus is
mutated blindly. Either way no exception but LowMemError may come out of a reader, it may take no longer than
`SECONDS_EACH` of a processor, and no more than `MEMORY_BYTES`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    atheris = None

os.environ.setdefault("LOWMEM_HOME", tempfile.mkdtemp(prefix="lowmem-fuzz-"))

READERS = [
    "lowmem.models", "lowmem.quant.journal", "lowmem.runtime.onnx.manifest", "lowmem.sweep.grid", "lowmem.sweep.table",
    "lowmem.ui.service.prompts",
]  # fmt: skip

with atheris.instrument_imports(include=READERS) if atheris and __name__ == "__main__" else nullcontext():
    from lowmem.background import limit_process
    from lowmem.errors import LowMemError
    from lowmem.models import derive, describe, encoded, hub, model_files, quantization, source
    from lowmem.models.files import ends_early
    from lowmem.models.foreign import parse_object
    from lowmem.models.generation_config import eos_token_ids, generation_fields
    from lowmem.models.spec import ModelSource, Tensor
    from lowmem.models.tensors import DTYPE_BYTES
    from lowmem.models.tokenizer_files import vocabulary_size
    from lowmem.quant import journal
    from lowmem.runtime.onnx.manifest import read_manifest
    from lowmem.sweep import grid, table
    from lowmem.ui.service.prompts import read_file

CORPUS = Path(__file__).with_name("corpus")
SECONDS_EACH = 2.0
MEMORY_BYTES = 200 * 2**20
LONGEST_SENTENCE = 1500
SOURCE = ModelSource("acme/toy", "toy")

LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 40, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "eos_token_id": [2, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


class InMemory:
    """`Files` without a disk."""

    owner = "toy"

    def __init__(self, **contents: bytes) -> None:
        self.contents = {name.replace("__", "."): data for name, data in contents.items()}

    @property
    def names(self) -> list[str]:
        return list(self.contents)

    def read(self, name: str) -> bytes:
        return self.contents[name]

    def ranged(self, name: str) -> InMemoryFile:
        return InMemoryFile(name, self.contents[name])

    def identity(self, name: str) -> str:
        return str(len(self.contents[name]))


class InMemoryFile:
    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.size = name, data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise ends_early(self, offset + length)
        return self.data[offset : offset + length]


def text(value: object) -> bytes:
    return json.dumps(value).encode()


def stored(layers: int = 2) -> dict[str, list[int]]:
    """The tensors of `LLAMA`."""
    block = {
        "self_attn.q_proj": [16, 16], "self_attn.k_proj": [8, 16], "self_attn.v_proj": [8, 16], "self_attn.o_proj": [16, 16],
        "mlp.gate_proj": [24, 16], "mlp.up_proj": [24, 16], "mlp.down_proj": [16, 24],
        "input_layernorm": [16], "post_attention_layernorm": [16],
    }  # fmt: skip
    blocks = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()}
    return {"model.embed_tokens.weight": [40, 16], **blocks, "model.norm.weight": [16], "lm_head.weight": [40, 16]}


def safetensors(tensors: dict[str, list[int]], dtype: str = "F16") -> bytes:
    size = {"F16": 2, "I32": 4}[dtype]
    entries, position = {}, 0
    for name, shape in tensors.items():
        count = size
        for side in shape:
            count *= side
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + count]}
        position += count
    header = text(entries)
    return len(header).to_bytes(8, "little") + header + bytes(position)


def gguf(tensors: int = 2, **metadata: Any) -> bytes:
    """A file whose values are texts, 32-bit numbers or lists of texts."""

    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(of: Any) -> bytes:
        if isinstance(of, list):
            return struct.pack("<IIQ", 9, 8, len(of)) + b"".join(map(string, of))
        if isinstance(of, str):
            return struct.pack("<I", 8) + string(of)
        return struct.pack("<If", 6, of) if isinstance(of, float) else struct.pack("<II", 4, of)

    fields = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.embedding_length": 16, "llama.rope.freq_base": 1e4,
        "llama.attention.head_count": 4, "llama.context_length": 64, "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 2.0, "llama.rope.scaling.attn_factor": 0.9, "tokenizer.ggml.tokens": ["a", "b"], "general.alignment": 32, **metadata,
    }  # fmt: skip
    names = ["token_embd.weight", "blk.0.attn_q.weight"][:tensors]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(fields))
    head += b"".join(string(key) + value(of) for key, of in fields.items())
    head += b"".join(
        string(name) + struct.pack("<IQQIQ", 2, 32, 2, 8, 128 * number) for number, name in enumerate(names)
    )
    return head + bytes(-len(head) % 32) + bytes(256)


WEIGHTS = safetensors(stored())
CONFIG = text(LLAMA)


def _derived(*_: object) -> Any:
    return next(iter(derive._shipped().values()))


def describing(**contents: bytes) -> None:
    """Describe a model without examining it: `build` does that."""
    derive._derived, derive._keep, derive._kept = _derived, lambda *_: None, lambda _: None  # type: ignore[assignment]
    derive._derived_here.clear()
    describe.describe(InMemory(**contents), SOURCE, encoders=True)


def in_folder(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of a file in a folder on disk."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=os.environ["LOWMEM_HOME"]))

    def target(data: bytes) -> None:
        (folder / name).write_bytes(data)
        read(folder)

    return target


def read_gguf(data: bytes) -> None:
    derive._derived, derive._keep, derive._kept = _derived, lambda *_: None, lambda _: None  # type: ignore[assignment]
    derive._derived_here.clear()
    describe.describe_gguf([InMemoryFile("toy.gguf", data)], SOURCE)


def read_encoded(data: bytes) -> None:
    """Codes and scales of any shape, described in any way."""
    case = _object(data)
    tensors = {
        name: Tensor(name, about[0], tuple(about[1]), 0)
        for name, about in _mapping(case.get("tensors")).items()
        if isinstance(about, list) and len(about) == 2 and about[0] in list(DTYPE_BYTES) and isinstance(about[1], list)
        if len(about[1]) <= 8 and all(type(side) is int and 0 <= side < 2**63 for side in about[1])
    }
    described = quantization.description(InMemory(), {"quantization_config": case.get("described")})
    if described is not None:
        encoded.encoding(tensors, described)
        found = quantization.parse_quantization(described)
        for name in ("model.layers.0.mlp.up_proj", "lm_head"):
            str(found.of(name).label + found.of(name).refusal())


def read_quantize_config(data: bytes) -> None:
    describing(config__json=CONFIG, quantize_config__json=data, model__safetensors=WEIGHTS)


def build(data: bytes) -> None:
    """What transformers builds of a configuration, and a pass through it."""
    from lowmem.models import meta_model, sizes

    config = _object(data)
    sizes.check_sizes(config, "toy", [Tensor(name, "fp16", tuple(shape), 0) for name, shape in stored().items()])
    if isinstance(config.get("model_type"), str):
        meta_model.anatomy(config, "toy", None, "fp16")


def _object(data: bytes) -> dict[str, Any]:
    return parse_object(data, "config.json")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


@dataclass
class Target:
    """A reader, what it reads when all is well, and how that is mutated."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    is_json: bool = True
    seconds: float = SECONDS_EACH
    memory: int = MEMORY_BYTES


PACKED = {
    "tensors": {
        "a.weight_packed": ["int32", [8, 2]], "a.weight_scale": ["fp16", [8, 1]], "b.weight": ["fp8", [8, 8]],
        "b.weight_scale_inv": ["fp32", [1, 1]], "c_blocks": ["uint8", [2, 8, 2, 16]], "c_scales": ["uint8", [2, 8, 2]],
        "d.weight_codes": ["uint8", [8, 4]], "d.weight_scales": ["fp16", [8, 1]], "e.weight": ["int8", [8, 8]],
        "e.weight_scale": ["fp32", [8]], "f.weight": ["uint8", [8, 8]], "f.weight_scale": ["fp8", [8, 1]],
        "f.weight_scale_2": ["fp32", []],
    },
    "described": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "packed_rows": {"d.weight": {"bits": 4}},
        "weight_block_size": [128, 128],
        "config_groups": {"g": {"targets": ["Linear", "re:.*up"], "weights": {"num_bits": 4, "strategy": "group"}}},
    },
}  # fmt: skip
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": True,
    "dynamic": {"+:.*up": {"bits": 8}, "-:lm": {}},
}
MANIFEST = {
    "model": "toy", "source": "acme/toy", "precision": "int8", "kind": "fused", "files": {"model.onnx": 0},
    "weights_bytes": 3, "int8_range": 127, "group_size": 32, "licence": "mit", "version": 2, "optimised": {}, "receipt": {},
    "model_tensors": [[name, "fp16", shape, 4] for name, shape in stored().items()], "parity": {"passed": True},
}  # fmt: skip
JOURNAL = {
    "settings": {"method": "rtn"}, "threads": 2, "blocks": 1, "shards": [{"entries": {}, "position": 0}],
    "activations": "block-1.bin", "checksum": 1, "losses": {"a": 0.5}, "tables": {"b": 8}, "shared": 0, "seconds": 1.0,
}  # fmt: skip
LISTING = {
    "sha": "abc", "gated": "auto", "cardData": {"license": "mit", "license_name": None},
    "siblings": [{"rfilename": "a", "size": 3, "blobId": "x"}, {"rfilename": "b", "lfs": {"sha256": "y", "size": 4}}],
}  # fmt: skip
GENERATION = {
    "eos_token_id": [2, 3], "suppress_tokens": [1], "bad_words_ids": [[1, 2]], "temperature": 0.7, "top_k": 20, "do_sample": True,
    "sequence_bias": [[[1, 2], -1.0]], "repetition_penalty": 1.1,
}  # fmt: skip
RESULTS = {"conditions": {"version": "1"}, "rows": [{"variant": "fp32", "kl": 0.5, "ram_bytes": 3, "model": "toy"}]}
FAMILIES: tuple[dict[str, Any], ...] = (
    LLAMA,
    {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 64, "vocab_size": 40},
    LLAMA | {"model_type": "gemma3_text", "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    LLAMA | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 40, "state_size": 4},
    {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 40},
    {"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}, "vision_config": {"num_hidden_layers": 1}},
)  # fmt: skip
GRID = b"models: [demo]\nprecisions: [fp32, int8]\nmethods:\n  rtn: {bits: [4, 8], group_size: 64}\nmeasure: {tokens: 100}\nram: 2GB\n"

TARGETS: dict[str, Target] = {
    "config": Target(
        lambda data: describing(config__json=data, model__safetensors=WEIGHTS),
        (CONFIG, text(LLAMA | {"text_config": LLAMA, "quantization_config": GPTQ, "dtype": "float16"})),
    ),
    "build": Target(build, tuple(map(text, FAMILIES)), seconds=60, memory=2**30),
    "header": Target(lambda data: describing(config__json=CONFIG, model__safetensors=data), (WEIGHTS,), is_json=False),
    "header_json": Target(
        lambda data: describing(config__json=CONFIG, model__safetensors=len(data).to_bytes(8, "little") + data + bytes(64)),
        (text({"a": {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}, "__metadata__": {"format": "pt"}}),),
    ),
    "index": Target(
        lambda data: describing(
            **{"config__json": CONFIG, "model__safetensors__index__json": data, "model-00001-of-00001__safetensors": WEIGHTS}
        ),
        (text({"metadata": {}, "weight_map": dict.fromkeys(stored(), "model-00001-of-00001.safetensors")}),),
    ),
    "gguf": Target(read_gguf, (gguf(), gguf(0), gguf(**{"split.count": 2})), is_json=False),
    "encoded": Target(read_encoded, (text(PACKED), text({**PACKED, "described": GPTQ}))),
    "quantize_config": Target(read_quantize_config, (text(GPTQ),)),
    "tokenizer": Target(
        in_folder("tokenizer.json", vocabulary_size),
        (text({"model": {"vocab": {"a": 0, "b": 1}}}), text({"model": {"vocab": [["a", 0.5]]}})),
    ),
    "vocabulary": Target(in_folder("vocab.json", vocabulary_size), (text({"a": 0, "b": 1}),)),
    "tokenizer_config": Target(
        lambda data: model_files.has_chat_template(InMemory(tokenizer_config__json=data)),
        (text({"chat_template": "{{ messages }}"}), text({"chat_template": [{"name": "default", "template": "x"}]})),
    ),
    "chat_template": Target(
        lambda data: model_files.has_chat_template(InMemory(chat_template__json=data)), (text({"chat_template": "x"}),)
    ),
    "manifest": Target(in_folder("lowmem_export.json", read_manifest), (text(MANIFEST),)),
    "exported": Target(lambda data: describing(config__json=CONFIG, lowmem_export__json=data), (text(MANIFEST),)),
    "journal": Target(in_folder("journal.json", journal._read), (text(JOURNAL),)),
    "generation_config": Target(
        in_folder("generation_config.json", lambda folder: (generation_fields(folder), eos_token_ids(folder))),
        (text(GENERATION),),
    ),
    "record": Target(
        in_folder("source.json", lambda folder: (source._source_in(folder, "x"), source._local_model(folder))),
        (text({"ref": "demo", "name": "Toy", "licence": "mit", "gated": False, "fingerprint": "f", "files": "g"}),),
    ),
    "listing": Target(lambda data: hub.parse_listing("acme/toy", data), (text(LISTING),)),
    "results": Target(in_folder("results.json", lambda folder: table._read(folder, {"version": "1"})), (text(RESULTS),)),
    "grid": Target(in_folder("grid.yaml", lambda folder: grid.read_grid(folder / "grid.yaml")), (GRID,), is_json=False),
    "prompts_jsonl": Target(
        in_folder("prompts.jsonl", lambda folder: read_file(folder / "prompts.jsonl")),
        (b'{"prompt": "Hi"}\n"Hello"\n',),
        is_json=False,
    ),
    "prompts_csv": Target(
        in_folder("prompts.csv", lambda folder: read_file(folder / "prompts.csv")), (b'prompt,x\n"a, b",c\n',), is_json=False
    ),
}  # fmt: skip


def corpus(name: str) -> list[bytes]:
    files = sorted((CORPUS / name).glob("*"))
    return [*TARGETS[name].seeds, *(file.read_bytes() for file in files)]


def check(name: str, data: bytes) -> None:
    """
    Raises:
        Exception: the reader raised something that is no sentence, or took too long.
    """
    target = TARGETS[name]
    started = time.process_time()
    try:
        target.read(data)
    except LowMemError as error:
        sentence = str(error)
        sentence.encode()
        assert len(sentence) < LONGEST_SENTENCE, f"{sentence[:300]} ... of {len(sentence)} characters"
    seconds = time.process_time() - started
    assert seconds < target.seconds, f"{seconds:.1f} s"


VALUES: tuple[str, ...] = (
    "null", "true", "false", "0", "-1", "1", "2", "7", "1000000000", "9223372036854775808", "1" + "0" * 400, "-1" + "0" * 400,
    "1.5", "-0.0", "1e308", "1e999", "-1e999", "NaN", "Infinity", '""', '"x"', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"',
    '"re:(a+)+$"', '"' + "a" * 3000 + '"', "[]", "[[]]", "[null]", "[1, 2]", '["x"]', "{}", '{"x": 1}', '{"bits": 4}',
    "[" * 50 + "]" * 50, '{"a":' * 50 + "1" + "}" * 50,
)  # fmt: skip


class _Raw(float):
    """A number that `json.dumps` writes as it is spelled here: larger than any, or not one."""


def mutate_json(data: bytes, chance: random.Random) -> bytes | None:
    """One value of the object replaced, doubled, moved or removed; None if it is not JSON."""
    try:
        value = json.loads(data)
        places = list(_places(value))
    except (ValueError, RecursionError):
        return None
    if not places:
        return chance.choice(VALUES).encode()
    container, key = chance.choice(places)
    action = chance.randrange(8)
    if action == 0:
        del container[key]
    elif action == 1:
        other, place = chance.choice(places)
        with suppress(IndexError, KeyError):
            container[key] = other[place]
    elif action == 2 and isinstance(container, dict):
        container[chance.choice(("x", "", "\ud800", "num_hidden_layers", "a" * 2000))] = container.pop(key)
    elif action == 3 and type(container[key]) in (int, float):
        container[key] = chance.choice(
            (-container[key], container[key] + 1, container[key] * 2**40, str(container[key]))
        )
    else:
        container[key] = "@replaced@"
    try:
        written = json.dumps(value)
    except (ValueError, RecursionError):  # it contains itself
        return None
    return written.replace('"@replaced@"', chance.choice(VALUES)).encode()


def _places(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


NUMBERS = (0, 1, 2, 7, 8, 9, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced, removed or repeated, or a number of 4 or 8 bytes written over them."""
    changed = bytearray(data or b"\0")
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(changed)) if changed else 0
        action = chance.randrange(5)
        if action == 0:
            changed[start : start + 1] = bytes([chance.randrange(256)])
        elif action == 1:
            form, width = chance.choice((("<I", 4), ("<Q", 8)))
            changed[start : start + width] = struct.pack(form, chance.choice(NUMBERS) % 2 ** (8 * width))
        elif action == 2:
            del changed[start : start + chance.choice((1, 2, 8, 64))]
        elif action == 3:
            changed[start:start] = changed[start : start + chance.choice((1, 8, 64))]
        else:
            changed[start:start] = chance.choice(VALUES).encode()
    return bytes(changed)


def mutate(name: str, data: bytes, chance: random.Random) -> bytes:
    if TARGETS[name].is_json and chance.random() < 0.9 and (changed := mutate_json(data, chance)) is not None:
        return changed
    return mutate_bytes(data, chance)


def blind(names: list[str], seconds: float) -> int:
    """Mutate the corpus for a while; returns the number of runs."""
    chance, known, runs = random.Random(" ".join(names)), {name: corpus(name) for name in names}, 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        name = chance.choice(names)
        data = chance.choice(known[name])
        for _ in range(chance.randint(1, 4)):
            data = mutate(name, data, chance)
        try:
            check(name, data)
        except BaseException:
            Path(f"crash-{name}").write_bytes(data)
            raise
        runs += 1
    return runs


def guided(names: list[str], seconds: float, folder: Path, seed: int) -> None:
    """Does not return: libFuzzer ends the process. The first byte of its inputs chooses the reader."""

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        chance = random.Random(seed)
        name, rest = names[data[0] % len(names)] if data else names[0], data[1:]
        changed = mutate(name, rest, chance) if chance.random() < 0.8 else atheris.Mutate(rest, longest - 1)
        return bytes([names.index(name)]) + changed[: longest - 1]

    def run(data: bytes) -> None:
        if data:
            check(names[data[0] % len(names)], data[1:])

    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        for data in corpus(name):
            (folder / f"{name}-{hashlib.sha1(data).hexdigest()}").write_bytes(bytes([number]) + data)
    arguments = [sys.argv[0], str(folder), f"-max_total_time={seconds:.0f}", "-timeout=120", "-rss_limit_mb=0"]
    arguments += [f"-seed={seed}"]
    arguments += ["-max_len=16384", "-len_control=0", "-print_final_stats=1", "-verbosity=0", "-artifact_prefix=crash-"]
    atheris.Setup(arguments, run, custom_mutator=mutator)
    atheris.Fuzz()


def lines_reached(name: str, data: bytes) -> set[tuple[str, int]]:
    """The lines of lowmem that a reader runs."""
    found: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        if "/lowmem/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        check(name, data)
    finally:
        sys.settrace(None)
    return found


def distil(names: list[str], folder: Path) -> None:
    """Add to the corpus what reaches lines that it does not reach yet, the shortest inputs first."""
    reached = {name: set().union(*(lines_reached(name, data) for data in corpus(name))) for name in names}
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        data = path.read_bytes()
        if data and not (new := lines_reached(name := names[data[0] % len(names)], data[1:])) <= reached[name]:
            reached[name] |= new
            (CORPUS / name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / hashlib.sha1(data[1:]).hexdigest()[:16]).write_bytes(data[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seconds", type=float)
    parser.add_argument("names", nargs="*", help="the readers; all but those that need torch")
    parser.add_argument(
        "--keep", type=Path, default=None, help="the folder that the inputs are written to that reach new code"
    )
    parser.add_argument(
        "--distil", type=Path, default=None, help="such a folder, of which the corpus takes what is new"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; 0 for others every time")
    options = parser.parse_args()
    logging.disable()
    names = options.names or [name for name, target in TARGETS.items() if target.memory == MEMORY_BYTES]
    if options.distil:
        distil(names, options.distil)
        return
    for name in names:
        for data in corpus(name):
            check(name, data)  # imports what is imported late, before memory is limited
    limit_process(max(TARGETS[name].memory for name in names))
    if atheris is None:
        print(f"{blind(names, options.seconds)} runs")
    else:
        guided(names, options.seconds, options.keep or Path(tempfile.mkdtemp()), options.seed)


if __name__ == "__main__":
    main()
