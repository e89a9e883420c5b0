"""A request to quantize a model. It is validated once, where it enters; everything below trusts it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, Unsupported
from lowmem.fields import build
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import Hardware, probe
from lowmem.messages import msg
from lowmem.models.encoded import ROW_BITS
from lowmem.quant import DEFAULT, get
from lowmem.quant.base import Method, Options
from lowmem.quant.calibration import Calibration
from lowmem.settings import settings

EMBEDDING_BITS = (*ROW_BITS, 16)
"""Bits of embedding and output head, the default first; 16 leaves them as they are, which every program can read."""


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What to quantize, how, and where the result goes.

    Args:
        model: "demo", a hub id, a folder or a .gguf file.
        options: an instance of `method.Options`.
        calibration: ignored by methods without calibration.
        embedding_bits: of embedding and output head, one of `EMBEDDING_BITS`; 16 leaves them as they are.
        out: the folder to create.
        budget: for the process that quantizes, including what it holds already.
        allow_paths: whether `model` may be a path on this machine.
        restart: delete an unfinished run with other settings, which otherwise refuses this one.
    """

    model: str
    method: Method
    options: Options
    calibration: Calibration = Calibration()  # noqa: RUF009  immutable
    embedding_bits: int = EMBEDDING_BITS[0]
    out: Path = Path("quantized")
    budget: MemoryBudget = UNLIMITED
    allow_paths: bool = True
    restart: bool = False

    @classmethod
    def validated(
        cls,
        model: str,
        method: str = DEFAULT,
        options: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        embedding_bits: int = EMBEDDING_BITS[0],
        *,
        hardware: Hardware | None = None,
        **rest: Any,
    ) -> QuantizeRequest:
        """A request from loose values: a form, an API call, a command line, a script.

        Args:
            options: fields of the method's `Options` by name; calibration: fields of `Calibration`.
            hardware: the machine it will run on; this one if None.
            rest: `out`, `budget`, `allow_paths`, `restart`.

        Raises:
            BadInput: there is no such method or option, or a value is out of range.
            Unsupported: the method does not run on this machine.
        """
        chosen = get(method)
        if refusal := chosen.available(hardware or probe()):
            raise Unsupported(refusal, msg("Choose another method."))
        built: Options = build(chosen.Options, options or {})
        built.check()
        return cls(
            model, chosen, built, build(Calibration, calibration or {}), checked_embedding_bits(embedding_bits), **rest
        )

    @property
    def name(self) -> str:
        """What a result is called after its model: method, bits, groups, and bits of the embedding if not the default."""
        options = self.options
        groups = f"-g{options.group_size}" if options.group_size > 0 else ""
        table = f"-e{self.embedding_bits}" if self.embedding_bits != EMBEDDING_BITS[0] else ""
        return f"{self.method.name}-{options.bits}bit{groups}{'-sym' if options.symmetric else ''}{table}"

    def as_dict(self) -> dict[str, Any]:
        """The request as JSON can carry it to another process; options at their default are left out."""
        return {
            "model": self.model,
            "method": self.method.name,
            "options": changed(self.options),
            "calibration": changed(self.calibration),
            "embedding_bits": self.embedding_bits,
            "out": str(self.out),
            "budget": self.budget.as_dict(),
            "allow_paths": self.allow_paths,
            "restart": self.restart,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> QuantizeRequest:
        """The request that `as_dict` wrote; it was validated before."""
        method = get(value["method"])
        parts = {
            "method": method,
            "options": method.Options(**value["options"]),
            "calibration": Calibration(**value["calibration"]),
            "out": Path(value["out"]),
            "budget": MemoryBudget(**value["budget"]),
        }
        return cls(**{**value, **parts})


def checked_embedding_bits(value: Any) -> int:
    """
    Raises:
        BadInput: none of `EMBEDDING_BITS`.
    """
    found = next((bits for bits in EMBEDDING_BITS if str(bits) == str(value).strip()), None)
    if found is None:
        raise BadInput(
            msg("Embedding and head cannot be stored in {bits} bits.", bits=str(value)[:20]),
            msg("Use {bits}; 16 leaves them as they are.", bits=", ".join(map(str, EMBEDDING_BITS))),
        )
    return found


def changed(options: Options | Calibration) -> dict[str, Any]:
    """The options that are not at their default, by name."""
    pairs = ((field, getattr(options, field.name)) for field in fields(options))
    return {field.name: value for field, value in pairs if value != field.default}


def output_folder(name: str, request: QuantizeRequest) -> Path:
    """Where the page puts a result of the model called `name`: below `settings().outputs`."""
    short = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return settings().outputs / f"{short}-{request.name}"
