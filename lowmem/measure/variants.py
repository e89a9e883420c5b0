"""Variants of a model to compare: a precision to load in, or a quantization. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowmem import quant
from lowmem.datasets.texts import NAMES
from lowmem.errors import BadInput
from lowmem.fields import build
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.messages import msg
from lowmem.precisions import PRECISIONS
from lowmem.quant import get
from lowmem.quant.base import Options
from lowmem.quant.calibration import Calibration
from lowmem.quant.request import EMBEDDING_BITS, QuantizeRequest, checked_embedding_bits

_ALIASES = {"int8_dynamic": "int8", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_CALIBRATION = tuple(field.name for field in fields(Calibration))
EMBEDDING = "embedding_bits"
_NUMBERS = ("bits", "group_size")


@dataclass(frozen=True, slots=True)
class Variant:
    """A precision or a quantization of a model.

    Args:
        name: such as "bf16" or "gptq:4:64".
        precision: one of `PRECISIONS` to load the original in; "" for a quantization.
        method, bits, group: the quantization, if `precision` is "".
        settings: other options of the method and of its calibration that differ from the defaults, as (name, value).
    """

    name: str
    precision: str = ""
    method: str = ""
    bits: int = 0
    group: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Fields of the method's `Options`."""
        more = {name: value for name, value in self.settings if name not in (*_CALIBRATION, EMBEDDING)}
        return {"bits": self.bits, "group_size": self.group} | more

    @property
    def calibration(self) -> dict[str, Any]:
        """Fields of `Calibration`."""
        return {name: value for name, value in self.settings if name in _CALIBRATION}

    def request(self, model: str, out: Path = Path(), budget: MemoryBudget = UNLIMITED) -> QuantizeRequest:
        """The quantization of `model` to `out`; the variant's settings are valid."""
        method = get(self.method)
        options, calibration = method.Options(**self.options), Calibration(**self.calibration)
        bits = dict(self.settings).get(EMBEDDING, EMBEDDING_BITS[0])
        return QuantizeRequest(model, method, options, calibration, bits, out, budget)


def parse_variant(text: str) -> Variant:
    """`"int8"`, `"gptq"` (4 bits in groups of 64), `"gptq:3"`, `"gptq:4:128:symmetric=true"` -> `Variant`.

    Raises:
        BadInput: not a variant.
    """
    word = text.strip().lower()
    word = _ALIASES.get(word, word)
    if word in PRECISIONS:
        return Variant(word, precision=word)
    method, *parts = word.split(":")
    numbers = [part for part in parts if "=" not in part]
    pairs = [part.partition("=") for part in parts if "=" in part]
    if method not in quant.METHODS or len(numbers) > len(_NUMBERS):
        raise BadInput(msg("There is no variant {text!r}.", text=text.strip()[:40]), _hint())
    named = {name: value for name, _, value in pairs}
    return make_variant(method, dict(zip(_NUMBERS, numbers, strict=False)) | named)


def make_variant(method: str, settings: Mapping[str, Any]) -> Variant:
    """The variant of a method with these options of the method and its calibration; the name includes non-default ones.

    Raises:
        BadInput: an unknown method or option, or an invalid value.
    """
    given = {name: value for name, value in settings.items() if name not in (*_CALIBRATION, EMBEDDING)}
    embedding = checked_embedding_bits(settings.get(EMBEDDING, EMBEDDING_BITS[0]))
    options = build(get(method).Options, given)
    options.check()
    calibration = build(Calibration, {name: settings[name] for name in _CALIBRATION if name in settings})
    if calibration.text not in NAMES:
        raise BadInput(
            msg("There is no calibration text {text!r}.", text=calibration.text[:40]),
            msg("Choose one of {names}.", names=", ".join(NAMES)),
        )
    non_default = (
        *_non_default(options, _NUMBERS),
        *(_non_default(calibration) if get(method).calibrated else ()),
        *(((EMBEDDING, embedding),) if embedding != EMBEDDING_BITS[0] else ()),
    )
    name = ":".join(
        [method, str(options.bits), str(options.group_size), *(f"{key}={_format(v)}" for key, v in non_default)]
    )
    return Variant(name, "", method, options.bits, options.group_size, non_default)


def _non_default(values: Options | Calibration, known: tuple[str, ...] = ()) -> tuple[tuple[str, Any], ...]:
    """Names and values of fields that differ from their defaults."""
    pairs = ((field, getattr(values, field.name)) for field in fields(values) if field.name not in known)
    return tuple((field.name, value) for field, value in pairs if value != field.default)


def _format(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _hint() -> str:
    return msg(
        "Write one of {precisions}, or METHOD:BITS:GROUP with a method of {methods}, like gptq:4:64 or gptq:4:64:symmetric=true.",
        precisions=", ".join(PRECISIONS),
        methods=", ".join(quant.METHODS),
    )


def parse_variants(texts: str | Iterable[str]) -> list[Variant]:
    """The variants in a comma-separated list or in several texts, without duplicates.

    Raises:
        BadInput: none, or one that is not a variant.
    """
    words = texts.split(",") if isinstance(texts, str) else list(texts)
    variants = [parse_variant(word) for word in words if word.strip()]
    if not variants:
        raise BadInput(msg("There are no variants to compare."), _hint())
    return list(dict.fromkeys(variants))
