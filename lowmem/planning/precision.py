"""Which precisions run a model on a device, and which the planner prefers."""

from __future__ import annotations

from lowmem.machine.device import Device
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.precisions import PRECISIONS

STORED = "stored"
"""The precision of quantized checkpoints."""


def available(precision: str, hardware: Hardware, device: str = "auto", spec: ModelSpec | None = None) -> str | None:
    """Why `precision` does not run on the device, None if it does.

    A quantized checkpoint (`spec`) runs only as "stored", and nothing else does.
    """
    place = device_of(hardware, device)
    if precision not in PRECISIONS:
        return msg(
            "There is no precision {precision!r}; choose one of {precisions}.",
            precision=precision,
            precisions=", ".join(PRECISIONS),
        )
    if (precision == STORED) != bool(spec and spec.quantization):
        return _stored_refusal(precision, spec)
    chosen = PRECISIONS[precision]
    if refusal := chosen.refusal(place):
        return refusal
    if "torch" in chosen.backends:
        return None
    return exported.missing() if spec is None else exported.refusal(spec)


def device_of(hardware: Hardware, device: str) -> Device:
    """The device behind a key; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return hardware.device
    return next((d for d in (*hardware.gpus, hardware.cpu) if d.key == device), hardware.device)


def storage_refusal(spec: ModelSpec) -> str:
    """Why a quantized checkpoint cannot run at all; "" if it can."""
    if not spec.quantization:
        return ""
    if spec.stored is None:
        return msg(
            "{model} is quantized with {quantization}, but its format is unknown.",
            model=spec.name,
            quantization=spec.quantization,
        )
    if refusal := spec.stored.refusal():
        return msg("{model} cannot be run. {refusal}", model=spec.name, refusal=refusal)
    if not spec.packed_layers:
        return msg(
            "config.json says that {model} is quantized with {quantization}, but none of its layers is.",
            model=spec.name,
            quantization=spec.quantization,
        )
    return ""


def candidates(hardware: Hardware, device: Device, spec: ModelSpec | None = None) -> tuple[str, ...]:
    """Precisions for the automatic choice on `device`, best first; a quantized checkpoint has one."""
    if spec is not None and spec.quantization:
        return (STORED,)
    ranks = {key: rank for key, precision in PRECISIONS.items() if (rank := precision.rank(device)) is not None}
    return tuple(key for key in sorted(ranks, key=ranks.__getitem__) if available(key, hardware, device.key) is None)


def _stored_refusal(precision: str, spec: ModelSpec | None) -> str:
    if precision == STORED:
        return msg("Only a model that is already quantized runs as stored.")
    name, method = (spec.name, spec.quantization) if spec else (msg("The model"), "")
    return msg(
        "{name} is already quantized with {method}: it runs as stored, not in {precision}.",
        name=name,
        method=method,
        precision=precision,
    )
