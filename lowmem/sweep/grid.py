"""The grid of a sweep: models x (precisions + methods x settings), from a YAML file or plain data.

    models: [demo, Qwen/Qwen2.5-0.5B-Instruct]
    precisions: [fp32, int8]
    methods:
      rtn: {bits: [3, 4, 8], group_size: [32, 64]}
      gptq: {bits: 4, symmetric: [false, true], samples: 16}
    text: manual
    measure: {tokens: 1024}
    ram: 4G

Every value in a setting's list is tried. Reads no model and imports no torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem import quant
from lowmem.datasets.texts import MANUAL
from lowmem.errors import BadInput
from lowmem.fields import build
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.measure.compare import DEFAULT_OPTIONS
from lowmem.measure.options import MeasureOptions
from lowmem.measure.variants import Variant, make_variant, parse_variant
from lowmem.messages import msg
from lowmem.precisions import PRECISIONS
from lowmem.units import MB, format_bytes

KEYS = ("models", "precisions", "methods", "text", "reference", "measure", "ram", "vram")
MAX_CELLS = 500
LARGEST_FILE_BYTES = 1 * MB

_EXAMPLE = msg("Write it like: models: [demo], precisions: [fp32, int8], methods: {rtn: {bits: [3, 4]}}.")


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table: a variant of a model."""

    model: str
    variant: Variant
    is_reference: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant.name}"


@dataclass(frozen=True, slots=True)
class Grid:
    """A validated grid.

    Args:
        reference: the variant that a model's others are compared with; it is always measured, and first.
        text: the evaluation text, see `evaluation_text`.
        budget: for all processes together.
    """

    models: tuple[str, ...]
    variants: tuple[Variant, ...]
    reference: Variant
    text: str = MANUAL
    options: MeasureOptions = DEFAULT_OPTIONS
    budget: MemoryBudget = UNLIMITED

    def cells(self) -> list[Cell]:
        """All variants of all models, each model's reference first."""
        others = [variant for variant in self.variants if variant != self.reference]
        return [
            Cell(model, variant, variant == self.reference)
            for model in self.models
            for variant in (self.reference, *others)
        ]


def read_grid(path: Path) -> Grid:
    """The grid in a YAML (or JSON) file.

    Raises:
        BadInput: the file cannot be read or is not a grid.
    """
    import yaml

    try:
        if (size := path.stat().st_size) > LARGEST_FILE_BYTES:
            raise BadInput(msg("{path} is {size}, too large for a grid.", path=path, size=format_bytes(size)), _EXAMPLE)
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            msg("{path} cannot be read: {error}.", path=path, error=getattr(error, "strerror", error)),
            msg("Choose a YAML file."),
        ) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: the 99th of May
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise BadInput(msg("{path} is not valid YAML, see line {line}.", path=path, line=line), _EXAMPLE) from None
    return make_grid(content)


def make_grid(content: Any) -> Grid:
    """The grid described by plain data, a mapping with `KEYS`.

    Raises:
        BadInput: naming the invalid part.
    """
    if not isinstance(content, Mapping) or not content:
        raise BadInput(msg("The grid is empty."), _EXAMPLE)
    if unknown := [str(key) for key in content if key not in KEYS]:
        raise BadInput(
            msg("A grid has no key {unknown!r}.", unknown=unknown[0][:40]),
            msg("Its keys are {keys}.", keys=", ".join(KEYS)),
        )
    models, precisions = _texts(content, "models"), _texts(content, "precisions")
    methods = _methods(content.get("methods") or {})
    if not models:
        raise BadInput(msg("The grid has no models."), _EXAMPLE)
    count = len(models) * (len(precisions) + sum(map(_count, methods.values())))
    if not count:
        raise BadInput(msg("The grid has neither precisions nor methods."), _EXAMPLE)
    if count > MAX_CELLS:
        raise BadInput(
            msg("The grid has {count:,} cells, more than {max_cells}.", count=count, max_cells=MAX_CELLS),
            msg("Remove some settings."),
        )
    reference = parse_variant(str(content.get("reference") or "fp32"))
    variants = [_precision(word) for word in precisions]
    variants += [make_variant(method, chosen) for method, settings in methods.items() for chosen in _product(settings)]
    return Grid(
        models=tuple(dict.fromkeys(models)),
        variants=tuple(dict.fromkeys(variants)),
        reference=reference,
        text=str(content.get("text") or MANUAL),
        options=build(MeasureOptions, _mapping(content.get("measure") or {}, "measure")),
        budget=MemoryBudget.parse(content.get("ram"), content.get("vram")),
    )


def _texts(content: Mapping[str, Any], key: str) -> list[str]:
    value = content.get(key) or []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
        raise BadInput(msg("{key} in the grid is not a list of names.", key=key), _EXAMPLE)
    return [word.strip() for word in words]


def _methods(value: Any) -> dict[str, Mapping[str, Any]]:
    """Method -> settings; methods in a plain list have none."""
    if isinstance(value, (str, list)):
        value = dict.fromkeys(_texts({"methods": value}, "methods"))
    methods = _mapping(value, "methods")
    if unknown := [method for method in methods if method not in quant.METHODS]:
        raise BadInput(
            msg("There is no quantization method {unknown!r}.", unknown=unknown[0][:40]),
            msg("Choose from {methods}.", methods=", ".join(quant.METHODS)),
        )
    return {method: _mapping(settings or {}, method) for method, settings in methods.items()}


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise BadInput(msg("{key} in the grid is not a mapping of names to values.", key=key), _EXAMPLE)
    return value


def _precision(word: str) -> Variant:
    variant = parse_variant(word)
    if not variant.precision:
        raise BadInput(
            msg("{word!r} is not a precision.", word=word[:40]),
            msg("Choose from {precisions}; list methods under methods.", precisions=", ".join(PRECISIONS)),
        )
    return variant


def _values(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]


def _count(settings: Mapping[str, Any]) -> int:
    return math.prod(len(_values(setting)) for setting in settings.values())


def _product(settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*map(_values, settings.values())):
        yield dict(zip(settings, values, strict=True))
