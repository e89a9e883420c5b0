"""Reading the header of a safetensors file: which tensors it contains, validated against the file's size.

Format: 8 bytes little-endian header length, a JSON object, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Reads no weights. huggingface_hub's `get_safetensors_metadata`
works on hub files only, and checks neither offsets nor sizes, so a truncated or hostile file would pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowmem.errors import CorruptModel, Unsupported
from lowmem.messages import msg
from lowmem.models.files import Ranged, ends_early
from lowmem.models.foreign import parse_object, reader, short
from lowmem.models.spec import DTYPE_BYTES, Tensor
from lowmem.models.tensors import MAX_DIMENSIONS

DTYPES = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8", "F8_E5M2": "fp8_e5m2", "F8_E8M0": "fp8_e8m0",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""dtype names of safetensors -> those of lowmem."""

MAX_HEADER = 100_000_000
"""The format's limit on the size of the header, in bytes."""

MAX_NAME = 1000
"""Characters of a tensor's name."""


@dataclass(frozen=True, slots=True)
class Header:
    """Tensors in file order, the offset of each in bytes from the start of the file, and free-text metadata."""

    tensors: tuple[Tensor, ...]
    offsets: dict[str, int]
    metadata: dict[str, str]


def read_header(file: Ranged) -> Header:
    """Parse and validate the header of `file`.

    Raises:
        CorruptModel: not safetensors, or header, shapes and file size contradict each other.
        Unsupported: an unknown dtype.
    """
    if file.size < 8:
        raise CorruptModel(
            msg("{file} has {size} bytes: too short for a safetensors file.", file=file.name, size=file.size),
            msg("Fetch the model again."),
        )
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER:
        raise _corrupt(
            file,
            msg(
                "a header of {length:,} bytes, above the format's {max_header:,}", length=length, max_header=MAX_HEADER
            ),
        )
    if 8 + length > file.size:
        raise ends_early(file, 8 + length)
    fields = parse_object(file.read(8, length), msg("The header of {file}", file=file.name))
    metadata = fields.pop("__metadata__", None)
    entries = sorted((_entry(file, name, value) for name, value in fields.items()), key=lambda entry: entry[1:])
    return _without_gaps(file, 8 + length, entries, metadata if isinstance(metadata, dict) else {})


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in the header; `data_offsets` count from the header's end."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_read_entry = reader(_Entry)


def _entry(file: Ranged, name: str, value: Any) -> tuple[Tensor, int, int]:
    """A tensor with its begin and end in bytes, relative to the end of the header."""
    if len(name) > MAX_NAME:
        raise _corrupt(file, msg("a tensor with a name of {length:,} characters", length=len(name)))
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _corrupt(file, msg("an entry {name!r} without dtype, shape and data_offsets", name=name))
    try:
        entry = _read_entry(value)
        dtype, shape, (begin, end) = entry.dtype, tuple(entry.shape), entry.data_offsets
        sound = len(shape) <= MAX_DIMENSIONS and min(*shape, begin, end) >= 0
    except ValueError:
        sound = False
    if not sound:
        raise _corrupt(file, msg("an entry {name!r} whose shape or data_offsets are not counts", name=name))
    if dtype not in DTYPES:
        raise Unsupported(
            msg("{file}: {name} has the unknown dtype {dtype}.", file=file.name, name=name, dtype=short(dtype)),
            msg("Choose another model."),
        )
    tensor = Tensor(name, DTYPES[dtype], shape, end - begin)
    needed = tensor.elements * DTYPE_BYTES[tensor.dtype]
    if tensor.nbytes != needed:
        raise _corrupt(
            file,
            msg(
                "{nbytes:,} bytes for {name}, whose shape {shape} needs {needed:,}",
                nbytes=tensor.nbytes,
                name=name,
                shape=list(shape),
                needed=needed,
            ),
        )
    return tensor, begin, end


def _without_gaps(file: Ranged, start: int, entries: list[tuple[Tensor, int, int]], metadata: dict[str, str]) -> Header:
    position, offsets = 0, {}
    for tensor, begin, end in entries:
        if begin != position:
            problem = msg("overlaps the tensor before it") if begin < position else msg("leaves a gap before it")
            raise _corrupt(
                file,
                msg(
                    "a tensor {tensor} that {problem} (begins at {begin:,}, expected {position:,})",
                    tensor=tensor.name,
                    problem=problem,
                    begin=begin,
                    position=position,
                ),
            )
        offsets[tensor.name], position = start + begin, end
    if start + position > file.size:
        raise ends_early(file, start + position)
    if start + position < file.size:
        raise _corrupt(
            file, msg("{difference:,} bytes that belong to no tensor", difference=file.size - start - position)
        )
    return Header(tuple(tensor for tensor, _, _ in entries), offsets, metadata)


def _corrupt(file: Ranged, what: str) -> CorruptModel:
    return CorruptModel(
        msg("{file} is not a valid safetensors file: it has {what}.", file=file.name, what=what),
        msg("Fetch the model again."),
    )
