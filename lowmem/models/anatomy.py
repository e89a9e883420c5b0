"""What planning knows of a model's inside: what each layer caches, and how much memory a forward pass takes.

Plain data. `meta_model.py` derives it from the family's own code, `derive.py` asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lowmem.models.blocks import BlockList
from lowmem.models.tensors import DTYPE_BYTES, Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of a sequence.

    Args:
        heads: KV heads, 0 for a layer without keys and values.
        key_dim, value_dim: numbers per head and token.
        window: the most tokens it keeps, 0 for all of them.
        state: numbers of a fixed size per sequence, in the dtype of the computation.
        state_bytes: the same for states of a dtype of their own.
        index: numbers per token for choosing the tokens that are attended to (DeepSeek's sparse attention).
    """

    heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    state: int = 0
    state_bytes: int = 0
    index: int = 0

    @property
    def numbers(self) -> int:
        """Numbers per token."""
        return self.heads * (self.key_dim + self.value_dim) + self.index

    @property
    def has_state(self) -> bool:
        return bool(self.state or self.state_bytes)

    @property
    def kind(self) -> str:
        """ "full", "sliding", "state" or "none"."""
        if self.heads:
            return "sliding" if self.window else "full"
        return "state" if self.has_state else "none"

    def fixed_bytes(self, dtype: str) -> int:
        """Bytes of the states of one sequence."""
        return self.state * DTYPE_BYTES[dtype] + self.state_bytes


Term = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes alive at once in a forward pass over T new tokens that see C tokens, as a maximum over its operations.

    Each term (a, b, c, d) is what is alive after one operation, a T + b T C + c C + d, for one sequence. Terms that are
    never the largest are left out.

    Args:
        first: of a pass that begins a sequence, where C is T.
        later: of a pass that continues one.
    """

    first: tuple[Term, ...]
    later: tuple[Term, ...]

    def bytes(self, tokens: int, context: int, batch: int) -> int:
        """Args:
        tokens: T, of each of `batch` sequences.
        context: C, the most that they see.
        """
        terms = self.first if context <= tokens else self.later
        return int(batch * max((value(term, tokens, context) for term in terms), default=0))


def value(term: Term, tokens: int, context: int) -> float:
    a, b, c, d = term
    return a * tokens + b * tokens * context + c * context + d


@dataclass(frozen=True, slots=True)
class Anatomy:
    """A model as the family's own code builds it from config.json; the fields are those of `ModelSpec`."""

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    tied: bool
    encoder: bool
    cached: bool
    caches: tuple[LayerCache, ...]
    activations: tuple[tuple[str, Activations], ...]
    tensors: tuple[Tensor, ...]
    blocks: BlockList = BlockList()  # noqa: RUF009  immutable
    experts: int = 0
    experts_per_token: int = 0

    def shape(self) -> dict[str, Any]:
        """All fields, as arguments of `ModelSpec`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_json(self) -> dict[str, Any]:
        """As JSON, with what repeats from block to block written once."""
        kinds = list(dict.fromkeys(self.caches))
        return self.shape() | {
            "caches": {
                "kinds": [[getattr(kind, field.name) for field in fields(LayerCache)] for kind in kinds],
                "layers": [kinds.index(cache) for cache in self.caches],
            },
            "activations": [[dtype, one.first, one.later] for dtype, one in self.activations],
            "tensors": _rows(self.tensors),
            "blocks": self.blocks.to_json(),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Anatomy:
        kinds = [LayerCache(*kind) for kind in found["caches"]["kinds"]]
        activations = (
            (dtype, Activations(_terms(first), _terms(later))) for dtype, first, later in found["activations"]
        )
        return cls(
            **{
                **found,
                "caches": tuple(kinds[index] for index in found["caches"]["layers"]),
                "activations": tuple(activations),
                "tensors": tuple(_tensors(found["tensors"])),
                "blocks": BlockList.from_json(found["blocks"]),
            }
        )


def _terms(found: Sequence[Sequence[float]]) -> tuple[Term, ...]:
    return tuple((a, b, c, d) for a, b, c, d in found)


_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


def _rows(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """[name with * for the block, blocks, everything else] of tensors that are alike in several blocks."""
    rows: dict[tuple[Any, ...], list[int]] = {}
    for tensor in tensors:
        block = _BLOCK.search(tensor.name)
        pattern = _BLOCK.sub("*", tensor.name, count=1)
        about = (tensor.dtype, tensor.shape, tensor.nbytes, tensor.role, tensor.transposed, tensor.wide, tensor.parts)
        packing = (tensor.packing,) if tensor.packing else ()
        rows.setdefault((pattern, *about, *packing), []).extend([int(block.group())] if block else [])
    return [[pattern, blocks, *about] for (pattern, *about), blocks in rows.items()]


def _tensors(rows: Sequence[Sequence[Any]]) -> Iterator[Tensor]:
    """The tensors block by block, after those outside that came before the first block."""
    ordered: list[tuple[int, int, Tensor]] = []
    begun = 0
    for number, (pattern, blocks, dtype, shape, *about) in enumerate(rows):
        begun = begun or len(blocks)
        packing = tuple(about.pop()) if isinstance(about[-1], (list, tuple)) else None  # few tensors have one
        for block in blocks or [-1 if not begun else 1 << 40]:
            name = pattern.replace("*", str(block), 1) if blocks else pattern
            ordered.append((block, number, replace(Tensor(name, dtype, tuple(shape), *about), packing=packing)))
    yield from (tensor for _, _, tensor in sorted(ordered, key=lambda found: found[:2]))
