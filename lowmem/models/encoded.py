"""Which weights of a checkpoint are stored as codes and scales that no layer of ours computes with.

They are dequantized as they are read (`dequantize.py`), and held in whatever precision the plan says. What they are is
told by the names, dtypes and shapes of the stored tensors; config.json only settles what these leave open. Sources: the
formats of DeepSeek and Qwen (FP8 with `weight_scale_inv`), OpenAI (MXFP4) and compressed-tensors
(https://github.com/vllm-project/compressed-tensors, `compressors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lowmem.errors import CorruptModel
from lowmem.messages import msg
from lowmem.models.foreign import AGAIN, pattern, short
from lowmem.models.quantization import INT8, parse_quantization
from lowmem.models.tensors import MAX_DIMENSIONS

FP8, INTEGERS, WORDS, MXFP4, NVFP4, ROWS = "FP8", "INT8", "packed integers", "MXFP4", "NVFP4", "packed rows"

FP8_DTYPES = ("fp8", "fp8_e5m2")

BLOCK = 128
"""Rows and columns that share a scale in FP8 checkpoints, unless they say otherwise."""

FP4_BLOCK = 16
"""Codes, two a byte, that `_blocks` of MXFP4 stores in a row of bytes."""


PACKED_ROWS = "packed_rows"
"""The entry of `quantization_config` for tables of lowmem's own: name of the weight -> {"bits": 8, 6 or 4}."""

ROW_BITS = (8, 6, 4)

CODES, SCALES = "_codes", "_scales"
"""What is appended to the name of a weight that is stored as such a table."""


class Stored(Protocol):
    """A stored tensor: `Tensor` or `Entry`."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """A weight that is stored as codes and scales.

    Args:
        name: of the weight, were it stored dense.
        kind: one of the constants above.
        codes, scales: names of the stored tensors; of NVFP4 the second scale is one for the whole weight.
        shape: of the weight.
        zeros: name of the zero points, "" if they are 0.
        order: name of the group of each column, "" if groups are runs of columns.
        bits: width of a code.
        block: rows and columns that share a scale.
        divides: the scale of the whole weight divides instead of multiplying.
    """

    name: str
    kind: str
    codes: str
    scales: tuple[str, ...]
    shape: tuple[int, ...]
    zeros: str = ""
    order: str = ""
    bits: int = 8
    block: tuple[int, int] = (1, 1)
    divides: bool = False

    @property
    def label(self) -> str:
        return f"INT{self.bits}" if self.kind == WORDS else self.kind

    @property
    def parts(self) -> tuple[str, ...]:
        """The stored tensors, in the order in which they are dequantized."""
        return tuple(filter(None, (self.codes, *self.scales, self.zeros, self.order)))


def encoded(tensors: Mapping[str, Stored], described: Mapping[str, Any]) -> list[Encoded]:
    """The encoded weights among `tensors`, by stored name.

    Args:
        described: the `quantization_config` of the checkpoint, empty without one.
    """
    known = parse_quantization(described) if described else None
    packed = known is not None and known.method == INT8 and not known.refusal()  # int8 codes run as they are
    return list(_find(tensors, described, packed))


def encoding(tensors: Mapping[str, Stored], described: Mapping[str, Any]) -> str:
    """The kinds of encoded weights among `tensors` for a person, such as "FP8"; "" without any."""
    found = (one for one in encoded(tensors, described) if one.kind != ROWS)  # which run from their codes
    return ", ".join(sorted({one.label for one in found}))


def _find(tensors: Mapping[str, Stored], described: Mapping[str, Any], packed: bool) -> Iterator[Encoded]:
    for codes, tensor in tensors.items():
        dtype, shape = tensor.dtype, tensor.shape
        if codes.endswith("_blocks") and (scales := f"{codes.removesuffix('_blocks')}_scales") in tensors:
            *stacked, rows, blocks, nbytes = _sides(codes, tensor, 3)
            name = codes.removesuffix("_blocks")
            yield Encoded(name, MXFP4, codes, (scales,), (*stacked, 2 * blocks * nbytes, rows), bits=4)
        elif codes.endswith(CODES) and (scales := codes.removesuffix(CODES) + SCALES) in tensors:
            groups = _sides(scales, tensors[scales], 2)[-1]
            yield _rows(codes.removesuffix(CODES), tensor, scales, groups, described)
        elif codes.endswith("_packed"):
            yield from _packed(codes.removesuffix("_packed"), codes, tensors, described)
        elif dtype in FP8_DTYPES and (scales := _first(tensors, codes, "_scale_inv", "_scale")):
            block = _block(_sides(codes, tensor, 2), tensors[scales].shape, described)
            yield Encoded(codes, FP8, codes, (scales,), shape, block=block)
        elif dtype == "uint8" and {f"{codes}_scale", f"{codes}_scale_2"} <= tensors.keys():
            scale = f"{codes}_scale"
            yield _nvfp4(codes, codes, tensors, (scale, f"{codes}_scale_2"))
        elif dtype == "int8" and not packed and (scales := _first(tensors, codes, "_scale")):
            block = _block(_sides(codes, tensor, 2), tensors[scales].shape, described)
            zeros = _first(tensors, codes, "_zero_point")
            yield Encoded(codes, INTEGERS, codes, (scales,), shape, zeros=zeros, block=block)


def _rows(name: str, codes: Stored, scales: str, groups: int, described: Mapping[str, Any]) -> Encoded:
    """A table of lowmem's own, see `packed_rows`; `quantization_config` says how wide its codes are."""
    tables = described.get(PACKED_ROWS)
    about = tables.get(name) if isinstance(tables, Mapping) else None
    bits = about.get("bits") if isinstance(about, Mapping) else None
    if bits not in ROW_BITS or codes.dtype != ("int8" if bits == 8 else "uint8"):
        raise CorruptModel(
            msg("config.json does not say in how many bits {name} is stored.", name=name),
            msg("Quantize the model again."),
        )
    rows, width = _sides(name + CODES, codes, 2, 2)
    columns = width * 8 // bits
    return Encoded(name, ROWS, name + CODES, (scales,), (rows, columns), bits=bits, block=(1, columns // groups))


def _packed(name: str, codes: str, tensors: Mapping[str, Stored], described: Mapping[str, Any]) -> Iterator[Encoded]:
    """The packed weights of compressed-tensors."""
    scale = f"{name}_scale"
    if scale not in tensors:
        return
    if tensors[codes].dtype == "uint8" and tensors[scale].dtype == "uint8":
        rows, columns = _sides(codes, tensors[codes], 2, 2)
        yield Encoded(name, MXFP4, codes, (scale,), (rows, 2 * columns), bits=4)
    elif tensors[codes].dtype == "uint8":
        yield _nvfp4(name, codes, tensors, tuple(filter(None, (scale, _first(tensors, name, "_global_scale")))))
    else:
        rows, words = _sides(codes, tensors[codes], 2, 2)
        bits = _scheme(described, name.rpartition(".")[0]).get("num_bits") or 4
        if type(bits) is not int or not 1 <= bits <= 32:
            raise CorruptModel(
                msg("config.json says that {name} is stored in {bits} bits.", name=name, bits=short(bits)), AGAIN
            )
        shape = (rows, words * (32 // bits))
        zeros, order = _first(tensors, name, "_zero_point"), _first(tensors, name, "_g_idx")
        block = _block(shape, tensors[scale].shape, {})
        yield Encoded(name, WORDS, codes, (scale,), shape, zeros, order, bits, block)


def _nvfp4(name: str, codes: str, tensors: Mapping[str, Stored], scales: tuple[str, ...]) -> Encoded:
    rows, columns = _sides(codes, tensors[codes], 2, 2)
    shape = (rows, 2 * columns)
    block = _block(shape, tensors[scales[0]].shape, {})
    return Encoded(name, NVFP4, codes, scales, shape, bits=4, block=block, divides=scales[-1].endswith("global_scale"))


def _sides(name: str, tensor: Stored, least: int, most: int = MAX_DIMENSIONS) -> tuple[int, ...]:
    """The shape of codes or scales, with as many dimensions as they have and no side of 0.

    Raises:
        CorruptModel: another shape.
    """
    if not least <= len(tensor.shape) <= most or 0 in tensor.shape:
        raise CorruptModel(
            msg("{name} is {shape}, which no weight is stored as.", name=name, shape=tuple(tensor.shape)), AGAIN
        )
    return tuple(tensor.shape)


def _first(tensors: Mapping[str, Stored], name: str, *endings: str) -> str:
    return next((name + ending for ending in endings if name + ending in tensors), "")


def _block(shape: tuple[int, ...], scales: tuple[int, ...], described: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    rows, columns = shape[-2:]
    *_, down, across = (1, 1, *scales) if len(scales) != 1 else (1, *scales, 1)
    wanted = described.get("weight_block_size")
    if not (isinstance(wanted, list) and len(wanted) == 2 and all(isinstance(n, int) and n > 0 for n in wanted)):
        wanted = [BLOCK, BLOCK]
    return _size(rows, down, wanted[0]), _size(columns, across, wanted[1])


def _size(length: int, count: int, wanted: int) -> int:
    """How long each of `count` pieces is, of which the last may be shorter."""
    return wanted if 1 < count < length and -(-length // wanted) == count else -(-length // max(1, count))


def _scheme(described: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """What compressed-tensors says of the weights of a layer: the group that names it, else the one of all linear layers."""
    groups = described.get("config_groups")
    found: dict[bool, Mapping[str, Any]] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        targets = group.get("targets") if isinstance(group, Mapping) else None
        for target in targets if isinstance(targets, list) else ():
            named = _names(str(target), layer)
            if isinstance(weights, Mapping) and (named or target == "Linear"):
                found.setdefault(named, weights)
    return found.get(True, found.get(False, {}))


def _names(target: str, layer: str) -> bool:
    return target == layer or (target.startswith("re:") and pattern(target[3:]).matches(layer))
