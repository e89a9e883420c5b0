"""A request to export a model, validated where it enters, and the estimate of its cost. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput, DiskFull, Unsupported
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import disk_free_bytes
from lowmem.machine.rates import Unmeasured
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.graph_options import ExportOptions
from lowmem.units import format_bytes


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What to export, where to, how, and with how much memory.

    Args:
        model: demo, a hub id, a folder or a .gguf file.
        out: a new folder.
        budget: for the process that exports, with what it holds already.
        allow_paths: whether `model` may be a path on this machine, which visitors of a page may not name.
        source: name of the model on the card of the export; `model` by default.

    Raises:
        BadInput: `out` exists.
    """

    model: str
    out: Path
    options: ExportOptions = field(default_factory=ExportOptions)
    budget: MemoryBudget = UNLIMITED
    allow_paths: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        if self.out.exists():
            raise BadInput(msg("{out} already exists.", out=self.out), msg("Choose another name, or delete it first."))

    def as_dict(self) -> dict[str, Any]:
        """The request for JSON: `ExportRequest.from_dict(request.as_dict()) == request`."""
        return asdict(self) | {"out": str(self.out), "budget": self.budget.as_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ExportRequest:
        """The request that `as_dict` wrote."""
        parts = {
            "out": Path(value["out"]),
            "options": ExportOptions(**value["options"]),
            "budget": MemoryBudget(**value["budget"]),
        }
        return cls(**{**value, **parts})


@dataclass(frozen=True, slots=True)
class ExportEstimate:
    """What an export will make and cost.

    Args:
        disk_bytes: size of the exported folder.
        ram_bytes: peak of the process that exports.
        seconds: time to write the graph and verify it; None if this machine was not measured.
        session_bytes: weights in memory while the graph runs.
        limit: bytes that the process may use.
        generic: why there is no fused graph, "" if there is one.
        caution: what the precision costs in quality, "" if little.
    """

    disk_bytes: int
    ram_bytes: int
    seconds: float | None
    session_bytes: int
    limit: int
    generic: str = ""
    caution: str = ""

    @property
    def verdict(self) -> str:
        if self.ram_bytes > self.limit:
            return "over"
        return "tight" if self.ram_bytes > 0.9 * self.limit else "fits"

    def sentence(self) -> str:
        if self.verdict == "over":
            return msg(
                "Needs {ram_bytes} of RAM, but the budget leaves {limit}.",
                ram_bytes=format_bytes(self.ram_bytes),
                limit=format_bytes(self.limit),
            )
        if self.generic:
            return msg(
                "Fits the budget of {limit}. Generic graph: {generic}",
                limit=format_bytes(self.limit),
                generic=self.generic,
            )
        return msg(
            "Fits the budget of {limit}. Fused graph: attention, cache and norms are single operators.",
            limit=format_bytes(self.limit),
        )


def estimate(
    spec: ModelSpec, options: ExportOptions, runtime_bytes: int, limit: int, refusal: str | None = None
) -> ExportEstimate:
    """Size, memory and time of an export, from the shape of the model alone.

    Args:
        runtime_bytes: what a process with torch holds before it exports.
        limit: bytes that the process may use.
        refusal: why the model has no fused graph, where more is known than its shape.

    Raises:
        BadInput: the model is an exported graph.
        Unsupported: no graph can be written of the model.
    """
    if spec.exported:
        raise BadInput(
            msg("{model} is already an exported graph.", model=spec.name), msg("Choose the model it was exported from.")
        )
    if reason := exported.impossible(spec):
        raise Unsupported(
            msg("{model} cannot be exported. {reason}", model=spec.name, reason=reason),
            msg("Run it with torch, or quantize it."),
        )
    generic = why_generic(spec, options, refusal)
    caution = exported.caution(spec, options.precision, fused=not generic)
    size = _disk_bytes(spec, options, bool(generic))
    if generic:
        peak = exported.tracing_bytes(spec, options.precision, options.group_size, options.optimise)
    else:
        peak = exported.writing_bytes(spec, options.precision, options.group_size, options.has_prefill)
    seconds = None
    with suppress(Unmeasured):
        seconds = exported.writing_seconds(spec, options, bool(generic))
    return ExportEstimate(size, runtime_bytes + peak, seconds, size, limit, generic, caution)


def check(spec: ModelSpec, request: ExportRequest, refusal: str | None = None) -> None:
    """Check what depends on the model: its precision, its layers and the disk space.

    Args:
        refusal: see `estimate`.

    Raises:
        BadInput: the options do not go with the model.
        Unsupported: no graph can hold the model's quantized weights.
        DiskFull: the export is larger than the free disk space.
    """
    options, generic = request.options, why_generic(spec, request.options, refusal)
    if spec.quantization and generic:
        raise Unsupported(
            msg(
                "{model} is quantized with {quantization}, which only fused graphs support. {generic}",
                model=spec.name,
                quantization=spec.quantization,
                generic=generic,
            ),
            msg("Export the original model."),
        )
    if spec.quantization and options.precision in ("fp32", "fp16"):
        raise BadInput(
            msg(
                "{model} is quantized: a graph in {precision} would only be larger.",
                model=spec.name,
                precision=options.precision,
            ),
            msg("Choose int4 or int8."),
        )
    size = needed = _disk_bytes(spec, options, bool(generic))
    if generic and options.precision != "fp32":  # the traced graph, which is converted afterwards
        needed += exported.generic_bytes(spec, "fp32")
    if generic and options.optimise:  # both graphs, until the faster one is chosen
        needed += size
    free = disk_free_bytes(request.out.absolute().parent)
    if needed > free:
        raise DiskFull(
            msg(
                "Exporting {model} needs {needed} of disk space, but only {free} is free.",
                model=spec.name,
                needed=format_bytes(needed),
                free=format_bytes(free),
            ),
            msg("Free some space, or choose fewer bits."),
        )


def why_generic(spec: ModelSpec, options: ExportOptions, refusal: str | None = None) -> str:
    """Why the graph will be a generic one; "" for a fused graph."""
    if spec.encoder:
        return msg("It is an encoder.")
    return refusal or exported.refusal(spec) or ("" if options.fused else msg("Standard operators were requested."))


def _disk_bytes(spec: ModelSpec, options: ExportOptions, generic: bool) -> int:
    if generic:
        return exported.generic_bytes(spec, options.precision, options.group_size)
    return exported.disk_bytes(spec, options.precision, options.group_size, options.has_prefill)
