"""What can be put side by side: a precision to load in, or a quantization to make and load. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowmem.errors import BadInput
from lowmem.fields import build
from lowmem.planning.plan import PRECISIONS
from lowmem.quant import METHODS, get

_ALIASES = {"int8_dynamic": "int8", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_HINT = (
    f"Write one of {', '.join(PRECISIONS)}, or METHOD:BITS:GROUP with a method of {', '.join(METHODS)}, like gptq:4:64."
)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run a model.

    Args:
        name: how it is written and shown: "bf16", "gptq:4:64".
        precision: one of `PRECISIONS` to load the original in, or "" for a quantization.
        method, bits, group: the quantization, when `precision` is "".
    """

    name: str
    precision: str = ""
    method: str = ""
    bits: int = 0
    group: int = 0


def parse_variant(text: str) -> Variant:
    """`"int8"`, `"gptq"` (4 bits in groups of 64), `"gptq:3"`, `"gptq:4:128"` -> `Variant`.

    Raises:
        BadInput: not a variant.
    """
    word = text.strip().lower()
    word = _ALIASES.get(word, word)
    if word in PRECISIONS:
        return Variant(word, precision=word)
    method, *numbers = word.split(":")
    if method not in METHODS or len(numbers) > 2:
        raise BadInput(f"There is no variant {text.strip()[:40]!r}.", _HINT)
    options = build(get(method).Options, dict(zip(("bits", "group_size"), numbers, strict=False)))
    options.check()
    return Variant(
        f"{method}:{options.bits}:{options.group_size}", method=method, bits=options.bits, group=options.group_size
    )


def parse_variants(texts: str | Iterable[str]) -> list[Variant]:
    """A comma-separated list, or several texts; each variant once, in order.

    Raises:
        BadInput: none, or one that is not a variant.
    """
    words = texts.split(",") if isinstance(texts, str) else list(texts)
    variants = [parse_variant(word) for word in words if word.strip()]
    if not variants:
        raise BadInput("There is no variant to compare.", _HINT)
    return list(dict.fromkeys(variants))
