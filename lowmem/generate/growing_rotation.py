"""Rotary positions whose frequencies depend on the length of the text: "longrope" (arXiv 2402.13753) and "dynamic" NTK.

transformers picks the frequencies by the largest position of a pass. So a prompt that is read in parts, or beside a longer
one, would be rotated by other frequencies than as a whole and alone. Here every row of a pass is rotated as the length of
its text wants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LONGROPE, DYNAMIC = "longrope", "dynamic"


class GrowingRotation:
    """What of `model` rotates by the length of the text.

    Attributes:
        limit: the length up to which frequencies are constant.
        switch: the length beyond which all tokens are rotated by other frequencies, those before it too (longrope);
            0 without one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if _kinds(module) & {LONGROPE, DYNAMIC}]
        self._remembers = any(DYNAMIC in _kinds(module) for module in self._modules)  # how long earlier texts were
        self.switch = min((limit for module in self._modules for limit in _switches(module)), default=0)
        lengths = [self.switch, *(int(getattr(module, "original_max_seq_len", 0)) for module in self._modules)]
        self.limit = min(filter(None, lengths), default=0)

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextmanager
    def of(self, lengths: Sequence[int]) -> Iterator[None]:
        """Rotate the rows of the passes within as texts of so many tokens."""
        if max(lengths) <= self.limit and not self._remembers:
            yield
            return
        for module in self._modules:
            module.forward = _rotated(module, module.forward, lengths)
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward


def _rotated(module: Any, forward: Callable[..., Any], lengths: Sequence[int]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def rotate(*args: Any, **kwargs: Any) -> Any:
        inputs = signature.bind(*args, **kwargs).arguments
        positions: Tensor = inputs["position_ids"]
        wanted = lengths if len(set(lengths)) > 1 else lengths[:1]
        positions = positions.expand(max(len(wanted), len(positions)), -1)
        parts = positions.split(len(positions) // len(wanted))
        rows = [_as_long(module, forward, inputs, part, length) for part, length in zip(parts, wanted, strict=True)]
        return rows[0] if len(rows) == 1 else _joined(rows)

    return rotate


def _as_long(module: Any, forward: Callable[..., Any], inputs: dict[str, Any], positions: Tensor, length: int) -> Any:
    """The rotation at `positions` in a text of `length` tokens: its last position goes in too, and comes out of the result."""
    last = positions.new_full((len(positions), 1), length - 1)
    for name in vars(module):  # what "dynamic" remembers of longer texts
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)
    rotation = forward(**{**inputs, "position_ids": torch.cat([positions, last], dim=1)})
    if isinstance(rotation, Tensor):
        return rotation[:, :-1]
    return tuple(factor[:, :-1] for factor in rotation)


def _joined(rows: list[Any]) -> Any:
    return torch.cat(rows) if isinstance(rows[0], Tensor) else tuple(map(torch.cat, zip(*rows, strict=True)))


def _kinds(module: Any) -> set[str]:
    """The kinds of scaling of a rotary embedding: one, or one by the type of layer."""
    kinds = getattr(module, "rope_type", None)
    found = kinds.values() if isinstance(kinds, dict) else [kinds]
    return {DYNAMIC if "dynamic" in kind else kind for kind in found if isinstance(kind, str)}


def _switches(module: Any) -> Iterator[int]:
    parameters = module.config.rope_parameters
    for kind in parameters.values() if isinstance(module.rope_type, dict) else [parameters]:
        if kind["rope_type"] == LONGROPE:
            yield int(kind["original_max_position_embeddings"])
