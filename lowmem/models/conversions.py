"""From the tensors of a checkpoint to the parameters of transformers' model: renamed, joined, cut or rearranged.

transformers describes for each family how the names of the hub's files differ from its own, and which tensors it joins,
such as the experts of a layer (`transformers.conversion_mapping`). Its loader converts whole models in memory. Here the
same descriptions become entries of a `Checkpoint`: what is joined or cut along rows is read in place from where it is
stored, and only what is rearranged is computed, when it is read.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from lowmem.models.entries import Converted, Entry, Joined, Source


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter, and the stored tensors that it is made of.

    Args:
        name: of the parameter.
        stored: names of the stored tensors, in the order of transformers' patterns, and within one of experts.
        shape: of the parameter.
        make: the parameter's entry in the checkpoint, given those of `stored`; None if it is the only one of `stored`.
        joined: its elements are those of `stored`, one tensor after the other.
    """

    name: str
    stored: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[list[Source]], Source] | None = None
    joined: bool = False

    def add_to(self, tensors: dict[str, Source]) -> str:
        """The name of this tensor in `tensors`, where it is entered if it is made of others."""
        if self.make is None:
            return self.stored[0]
        tensors[self.name] = self.make([tensors[name] for name in self.stored])
        return self.name


class Conversions:
    """Which parameters of `model` are made of which tensors.

    Attributes, of what `targets` was given:
        prefix: what a larger model puts in front of the names.
        unused: the names that belong to no parameter.
    """

    prefix, unused = "", frozenset[str]()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._built = _AsBuilt(model.config, dict(model.named_parameters()))
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def targets(self, stored: Collection[str]) -> list[Target]:
        """The parameters that tensors of these names make, in the order of the names; others are left out."""
        ordered = sorted(stored, key=dot_natural_key)
        prefix = self.prefix = self._prefix(ordered)
        groups: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        for name in ordered:
            found = self._target(name) or (self._target(name.removeprefix(prefix)) if name.startswith(prefix) else None)
            if found is not None:
                parameter, pattern = found
                groups[parameter][pattern].append(name)
        self.unused = frozenset(ordered) - {
            name for group in groups.values() for names in group.values() for name in names
        }
        return list(chain.from_iterable(self._made(name, patterns) for name, patterns in groups.items()))

    def _target(self, name: str) -> tuple[str, str | None] | None:
        """The parameter that a stored tensor is part of, and the pattern of the converter that says so."""
        options: tuple[tuple[list[Any], list[Any]], ...] = ((self._renamings, self._converters), ([], []))
        for renamings, converters in options:
            renamed, pattern = rename_source_key(
                name, renamings, converters, self._model.base_model_prefix, self._shapes
            )
            if renamed in self._shapes:
                return renamed, pattern
        return None

    def _prefix(self, ordered: Iterable[str]) -> str:
        """What a larger model, such as a vision-language model, puts in front of the names of this one; "" for nothing."""
        counts: dict[str, int] = defaultdict(int)
        for name in ordered:
            if self._target(name) is not None:
                counts[""] += 1
                continue
            start = 0
            while (start := name.find(".", start) + 1) > 0:
                if self._target(name[start:]) is not None:
                    counts[name[:start]] += 1
        return max(counts, key=lambda prefix: counts[prefix], default="")

    def _made(self, parameter: str, patterns: dict[str | None, list[str]]) -> Iterator[Target]:
        if None in patterns:  # stored under one name, or under an old and a new one
            yield Target(parameter, tuple(patterns[None][:1]), self._shapes[parameter])
            return
        converter = next(rule for rule in self._converters if set(rule.source_patterns) & set(patterns))
        lists = [patterns[pattern] for pattern in converter.source_patterns if pattern in patterns]
        kinds = [type(operation) for operation in converter.operations]
        if kinds == [Chunk] and getattr(converter.operations[0], "dim", 0) == 0:
            yield from self._cut(parameter, converter, lists[0][0])
        elif _joins(converter):
            names = tuple(chain.from_iterable(zip(*lists, strict=True)))
            yield Target(parameter, names, self._shapes[parameter], _joined(self._shapes[parameter]), joined=True)
        else:
            yield from self._computed(parameter, converter, lists)

    def _siblings(self, parameter: str, converter: WeightConverter) -> list[str]:
        """The parameters that a converter with several targets makes, of which `parameter` is the first."""
        first = re.search(re.escape(converter.target_patterns[0].replace("*", "0")), parameter)
        if first is None or len(converter.target_patterns) == 1:
            return [parameter]
        start, end = first.span()
        return [parameter[:start] + pattern + parameter[end:] for pattern in converter.target_patterns]

    def _cut(self, parameter: str, converter: WeightConverter, stored: str) -> Iterator[Target]:
        names = self._siblings(parameter, converter)
        for number, name in enumerate(names):
            yield Target(name, (stored,), self._shapes[name], _part(number, len(names)))

    def _computed(self, parameter: str, converter: WeightConverter, lists: list[list[str]]) -> Iterator[Target]:
        patterns = converter.source_patterns[: len(lists)]
        names = tuple(chain.from_iterable(lists))
        for name in self._siblings(parameter, converter):
            convert = _Convert(self._built, converter, parameter, name, patterns, [len(one) for one in lists])
            yield Target(name, names, self._shapes[name], _converted(self._shapes[name], convert))


def _joins(converter: WeightConverter) -> bool:
    """Whether the rows of the result are those of the sources, one source after the other.

    Experts are stacked along a new first dimension; what is then joined along the second are rows of one expert.
    """
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)], [(Concatenate, 0)])


def _joined(shape: tuple[int, ...]) -> Callable[[list[Source]], Source]:
    def make(sources: list[Source]) -> Source:
        stored = [source for source in sources if isinstance(source, Entry)]
        if len(stored) == len(sources) and len({source.dtype for source in stored}) == 1:
            return Entry(stored[0].dtype, shape, tuple(chain.from_iterable(source.extents for source in stored)))
        return Joined(sources[0].dtype, shape, tuple(sources))

    return make


def _part(number: int, count: int) -> Callable[[list[Source]], Source]:
    def make(sources: list[Source]) -> Source:
        rows = sources[0].shape[0] // count
        return sources[0].rows(number * rows, (number + 1) * rows)

    return make


def _converted(
    shape: tuple[int, ...], convert: Callable[[list[torch.Tensor]], torch.Tensor]
) -> Callable[[list[Source]], Converted]:
    def make(sources: list[Source]) -> Converted:
        return Converted(sources[0].dtype, shape, tuple(sources), convert)

    return make


@dataclass(frozen=True)
class _AsBuilt:
    """What transformers' operations ask of a model, as it was before lowmem's layers took the place of its own."""

    config: Any
    parameters: dict[str, torch.Tensor]

    def get_parameter(self, name: str) -> torch.Tensor:
        return self.parameters[name]


@dataclass(frozen=True)
class _Convert:
    """Runs transformers' own operations; `counts` sources belong to each of `patterns`."""

    model: _AsBuilt
    converter: WeightConverter
    parameter: str
    name: str
    patterns: list[str]
    counts: list[int]

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        converter: Any = copy.deepcopy(self.converter)
        rest = iter(tensors)
        for pattern, count in zip(self.patterns, self.counts, strict=True):
            converter.collected_tensors[pattern] = [_Ready(next(rest)) for _ in range(count)]
        made = converter.convert(self.parameter, model=self.model, config=self.model.config)
        tensor = made[self.name]
        return tensor[0] if isinstance(tensor, list) else tensor


class _Ready:
    """What transformers' loader calls to read a tensor, for one that has been read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self._tensor
