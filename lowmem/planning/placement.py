"""Where every decoder block lives, and how many bytes that is. Names and numbers only; no torch, no files.

A block's home is the memory of the device that computes: "gpu", or "ram" on a CPU. Blocks elsewhere stream through two
buffers there. What is no block (embeddings, the last norm, the head) is always at home.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowmem.errors import BadInput
from lowmem.models.spec import ModelSpec, Tensor

PLACES = ("gpu", "ram", "disk")

SLOTS = 2
"""Blocks in flight: one computes while the next arrives."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where blocks live.

    Args:
        blocks: for every block one of `PLACES`.
        mapped: blocks on disk are used where the page cache holds them, and count as RAM; without it they are read
            past the page cache.
    """

    blocks: tuple[str, ...]
    mapped: bool = False

    def indices(self, *places: str) -> tuple[int, ...]:
        return tuple(index for index, place in enumerate(self.blocks) if place in places)

    def streamed(self, device_kind: str) -> tuple[int, ...]:
        """Blocks that pass through the device's buffers with every token."""
        if device_kind == "cpu":
            return () if self.mapped else self.indices("disk")
        return self.indices("ram", "disk")

    def sentence(self) -> str:
        """ "6 blocks in RAM, 24 on disk"."""
        names = {"gpu": "on the GPU", "ram": "in RAM", "disk": "on disk"}
        counts = [(self.blocks.count(place), names[place]) for place in PLACES]
        present = [f"{count} {where}" for count, where in counts if count]
        first, *rest = present or ["none"]
        number, _, where = first.partition(" ")
        return ", ".join((f"{number} block{'s' * (number != '1')} {where}", *rest))


def all_at_home(spec: ModelSpec, device_kind: str) -> Placement:
    return Placement((home(device_kind),) * spec.layers)


def home(device_kind: str) -> str:
    return "ram" if device_kind == "cpu" else "gpu"


def chosen(placement: Placement, place: str, indices: Iterable[int]) -> Placement:
    """`placement` with the named blocks in `place`; negative numbers count from the end.

    Raises:
        BadInput: there is no such block, or no such place.
    """
    blocks = list(placement.blocks)
    if place not in PLACES:
        raise BadInput(f"There is no place {place!r}.", f"Choose one of {', '.join(PLACES)}.")
    for index in indices:
        if not -len(blocks) <= index < len(blocks):
            raise BadInput(f"There is no block {index}.", f"The model has blocks 0 to {len(blocks) - 1}.")
        blocks[index] = place
    return replace(placement, blocks=tuple(blocks))


def spread(count: int, of: int) -> tuple[int, ...]:
    """`count` numbers below `of`, evenly spread: blocks at home give those on their way time to arrive."""
    return tuple(number * of // count for number in range(count)) if count else ()


def block_index(name: str) -> int | None:
    """The block that a tensor belongs to, None outside of blocks: "model.layers.3.mlp.up_proj.weight" -> 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def counted(spec: ModelSpec) -> list[Tensor]:
    """The stored tensors that a model is made of."""
    return [t for t in spec.tensors if not (t.is_buffer or (spec.tied and t.is_output_embedding))]


def stored_block_bytes(spec: ModelSpec) -> list[int]:
    """Bytes of every block as the files hold it: what streams."""
    sizes = [0] * spec.layers
    for tensor in counted(spec):
        index = block_index(tensor.name)
        if index is not None and index < len(sizes):
            sizes[index] += tensor.nbytes
    return sizes
