"""The place of every decoder block, and its size in bytes. Plain data: no torch, no files.

A resident block is in the memory of the device that computes: "gpu", or "ram" on a CPU. An offloaded block streams through
two buffers there. Everything outside the blocks (embeddings, the last norm, the output head) is always resident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lowmem.errors import BadInput
from lowmem.messages import Message, join, msg
from lowmem.models.spec import ModelSpec, Tensor

PLACES = ("gpu", "ram", "disk")

SLOTS = 2
"""Blocks in transit: one computes while the next is copied."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where blocks live.

    Args:
        blocks: for every block one of `PLACES`.
        mapped: blocks on disk are memory-mapped: the page cache holds them, and they count as RAM. Otherwise they are read
            past the page cache.
    """

    blocks: tuple[str, ...]
    mapped: bool = False

    def indices(self, *places: str) -> tuple[int, ...]:
        return tuple(index for index, place in enumerate(self.blocks) if place in places)

    def streamed(self, device_kind: str) -> tuple[int, ...]:
        """Blocks that stream through the device's buffers for every token."""
        if device_kind == "cpu":
            return () if self.mapped else self.indices("disk")
        return self.indices("ram", "disk")

    def sentence(self) -> str:
        """ "6 blocks in RAM, 24 on disk"."""
        names = {"gpu": msg("on the GPU"), "ram": msg("in RAM"), "disk": msg("on disk")}
        counts = [(self.blocks.count(place), names[place]) for place in PLACES]
        (first, where), *rest = [pair for pair in counts if pair[0]] or [(0, "")]
        blocks = msg("{count} block {where}") if first == 1 else msg("{count} blocks {where}")
        others = (Message("{count} {where}", count=count, where=where) for count, where in rest)
        return join(", ", (Message(blocks, count=first, where=where), *others))


def all_resident(spec: ModelSpec, device_kind: str) -> Placement:
    """Nothing offloaded."""
    return Placement((resident_place(device_kind),) * spec.layers)


def resident_place(device_kind: str) -> str:
    """The place of resident blocks on a device of this kind."""
    return "ram" if device_kind == "cpu" else "gpu"


def chosen(placement: Placement, place: str, indices: Iterable[int]) -> Placement:
    """`placement` with the blocks `indices` moved to `place`; negative numbers count from the end.

    Raises:
        BadInput: no such block or place.
    """
    blocks = list(placement.blocks)
    if place not in PLACES:
        raise BadInput(
            msg("There is no place {place!r}.", place=place), msg("Choose one of {places}.", places=", ".join(PLACES))
        )
    for index in indices:
        if not -len(blocks) <= index < len(blocks):
            raise BadInput(
                msg("There is no block {index}.", index=index),
                msg("The model has blocks 0 to {difference}.", difference=len(blocks) - 1),
            )
        blocks[index] = place
    return replace(placement, blocks=tuple(blocks))


def spread(count: int, of: int) -> tuple[int, ...]:
    """`count` numbers below `of`, evenly spaced: while resident blocks compute, the offloaded ones are copied."""
    return tuple(number * of // count for number in range(count)) if count else ()


def block_index(name: str) -> int | None:
    """The block that a tensor belongs to, None outside the blocks: "model.layers.3.mlp.up_proj.weight" -> 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def read_per_token(spec: ModelSpec) -> list[tuple[Tensor, float]]:
    """The matrices that a token is multiplied by, each with the share of it that is read.

    Of an embedding a token reads one row, unless that is the output head as well; of experts it reads the chosen ones.
    """
    chosen = spec.experts_per_token / spec.experts if spec.experts and spec.experts_per_token else 1.0
    head = (spec.vocab, spec.hidden) if spec.tied else ()

    def share(tensor: Tensor) -> float:
        if tensor.role == "embedding":
            return float(tensor.shape == head)  # there may be others, such as one for every layer
        return chosen if tensor.role == "experts" else 1.0

    matrices = (tensor for tensor in spec.tensors if tensor.role != "other" or tensor.packed_layer)
    return [(tensor, read) for tensor in matrices if (read := share(tensor))]


def stored_block_bytes(spec: ModelSpec) -> list[int]:
    """Bytes of every block as stored on disk, which is what streams."""
    sizes = [0] * spec.layers
    for tensor in spec.tensors:
        index = block_index(tensor.name)
        if index is not None and index < len(sizes):
            sizes[index] += tensor.nbytes
    return sizes
