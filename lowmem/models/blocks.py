"""Decoder blocks: which linear layers of a block share an input, in which order they run, and where its branches end.

Plain data, derived from a pass through the model without weights (`meta_blocks.py`). Code that works block by block, such as
quantization, reads it from a `ModelSpec`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from lowmem.messages import msg


@dataclass(frozen=True, slots=True)
class Stage:
    """Linear layers of a block that share an input; names are relative to the block.

    Args:
        linears: in the order in which they run; or one projection of all experts, which read the tokens routed to them.
        source: the norm or linear layer that produces this input channel by channel, so that dividing its weights by a
            factor per channel divides the input; of a fused layer its last outputs. "" if there is none, or as long as
            `quant.folding` has not looked for it.
        offset: what the source, a norm, adds to its stored weights: 1 for Gemma.
    """

    linears: tuple[str, ...]
    source: str = ""
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class Branch:
    """A part of a block that returns what its last linear layer, `output`, computes.

    Args:
        nones: how many values that nobody reads it returns beside the result; -1 for a module that returns the bare
            tensor.
    """

    module: str
    output: str
    nones: int


@dataclass(frozen=True, slots=True)
class Block:
    """A kind of block.

    Args:
        stages: in the order of computation.
        branches: usually attention and MLP.
        nones: of the block itself, see `Branch`.
    """

    stages: tuple[Stage, ...] = ()
    branches: tuple[Branch, ...] = ()
    nones: int = -1

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for stage in self.stages for name in stage.linears)


NOT_APART = {
    "inputs": msg("its blocks exchange more than one tensor"),
    "shared": msg("its blocks share layers"),
    "states": msg("its blocks read what others keep"),
    "unknown": msg("transformers' code for it could not be followed"),
}
"""Why the blocks of a model cannot be run one after the other, by `BlockList.not_apart`."""


@dataclass(frozen=True, slots=True)
class BlockList:
    """The blocks of a model.

    Args:
        path: of the list of blocks within the model, "model.layers"; "" if there is none.
        kinds: the different blocks.
        layers: the kind of every block, in order.
        not_apart: a key of `NOT_APART`; "" if each block needs nothing but its predecessor's output and what the model
            computes from the positions.
    """

    path: str = ""
    kinds: tuple[Block, ...] = ()
    layers: tuple[int, ...] = ()
    not_apart: str = ""

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Block:
        return self.kinds[self.layers[index]]

    def to_json(self) -> list[Any]:
        return [
            self.path,
            [
                [[stage.linears for stage in kind.stages], [astuple(branch) for branch in kind.branches], kind.nones]
                for kind in self.kinds
            ],
            self.layers,
            self.not_apart,
        ]

    @classmethod
    def from_json(cls, found: Any) -> BlockList:
        path, kinds, layers, not_apart = found
        made = (
            Block(tuple(Stage(tuple(names)) for names in stages), tuple(Branch(*branch) for branch in branches), nones)
            for stages, branches, nones in kinds
        )
        return cls(path, tuple(made), tuple(layers), not_apart)
