"""Which precisions run on which device, and in what order to prefer them."""

from __future__ import annotations

import importlib.util

from lowmem.kernels.layouts import has_int8_kernels
from lowmem.machine.device import Device
from lowmem.machine.hardware import Hardware
from lowmem.models.quantization import BNB, Quantization
from lowmem.models.spec import ModelSpec
from lowmem.planning import exported
from lowmem.planning.plan import PRECISIONS


def available(precision: str, hardware: Hardware, device: str = "auto", spec: ModelSpec | None = None) -> str | None:
    """None when `precision` runs on the device, else the reason it does not.

    A quantized checkpoint (`spec`) runs as it is stored and in no other way; nothing else runs "stored".
    """
    place = device_of(hardware, device)
    if precision not in PRECISIONS:
        return f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}."
    if (precision == "stored") != bool(spec and spec.quantization):
        return _stored_refusal(precision, spec)
    if precision in ("fp16", "bf16"):
        return _half_refusal(precision, place)
    if precision == "int8":
        return _int8_refusal(place)
    if precision == "int4":
        return _int4_refusal(place, spec)
    if precision in ("bnb8", "nf4"):
        return _bnb_refusal(place)
    return None


def device_of(hardware: Hardware, device: str) -> Device:
    """The device behind a key; "auto" is the first GPU, else the CPU."""
    if device == "auto":
        return hardware.device
    return next((d for d in (*hardware.gpus, hardware.cpu) if d.key == device), hardware.device)


def caution(precision: str, hardware: Hardware, device: str = "auto") -> str:
    """A sentence about a precision that works but disappoints, or ""."""
    place = device_of(hardware, device)
    if place.kind == "cpu" and precision in ("bnb8", "nf4"):
        return "bitsandbytes is made for GPUs: on a CPU it saves memory but is many times slower than int8."
    if place.kind == "cpu" and precision == "bf16" and "bf16" not in place.dtypes:
        return "This CPU has no bf16 instructions: half the memory of fp32, but a slow prefill."
    if place.kind == "cuda" and precision == "bnb8":
        return "LLM.int8 is several times slower than fp16 or NF4."
    return ""


def storage_refusal(spec: ModelSpec) -> str:
    """Why a quantized checkpoint cannot be run at all, or ""."""
    if not spec.quantization:
        return ""
    if spec.stored is None:
        return f"{spec.name} is quantized with {spec.quantization}, of which nothing more is known."
    if refusal := spec.stored.refusal():
        return f"{spec.name} cannot be run: {refusal[0].lower()}{refusal[1:]}"
    if not spec.packed_layers:
        return f"{spec.name} is quantized with {spec.quantization}, says its config.json, but none of its layers is."
    return ""


def rest_precision(dtype: str, stored: Quantization | None = None) -> str:
    """Precision of the dense layers of a quantized checkpoint: int8 on CPUs that have it, else the compute dtype.

    A tied head is a fifth of a small model, and in fp32 takes longer per token than all packed layers together. bitsandbytes'
    layers take far longer than that on CPUs, so their checkpoints stay as they are.
    """
    if stored is not None and stored.method == BNB:
        return dtype
    return "int8" if dtype == "fp32" and has_int8_kernels() else dtype


def candidates(hardware: Hardware, device: Device, spec: ModelSpec | None = None) -> tuple[str, ...]:
    """Precisions worth choosing automatically, best first; a quantized checkpoint has one.

    A GPU loses quality step by step: half precision, 8 bits, 4 bits. On a CPU dynamic int8 is
    both the fastest and nearly exact, so it comes before the wider ones.
    """
    if spec is not None and spec.quantization:
        return ("stored",)
    if device.kind == "cpu":
        order: tuple[str, ...] = ("int8", "bf16", "fp32", "nf4")
    elif device.kind == "cuda":
        order = (device.dtypes[0], "bnb8", "nf4")
    else:
        order = (device.dtypes[0],)
    return tuple(p for p in order if available(p, hardware, device.key) is None)


def _stored_refusal(precision: str, spec: ModelSpec | None) -> str:
    if precision == "stored":
        return "Only a model that is already quantized runs as stored."
    name, method = (spec.name, spec.quantization) if spec else ("The model", "")
    return f"{name} is already quantized with {method}: it runs as stored, not in {precision}."


def _half_refusal(precision: str, place: Device) -> str | None:
    if place.kind == "cpu":
        # fp16 has no fast CPU kernels in torch; bf16 does, and where it is slow it still halves the memory.
        return "fp16 is slow and imprecise on CPUs; use bf16 or int8." if precision == "fp16" else None
    return None if precision in place.dtypes else f"{place.name} does not support {precision}."


def _int8_refusal(place: Device) -> str | None:
    if place.kind != "cpu":
        return "Dynamic int8 is a CPU method; on a GPU use 8-bit or 4-bit bitsandbytes."
    if not has_int8_kernels():
        return "Dynamic int8 needs an x86 processor."
    return None


def _int4_refusal(place: Device, spec: ModelSpec | None) -> str | None:
    if place.kind != "cpu":
        return "int4 graphs run on CPUs; on a GPU use NF4."
    return exported.missing() if spec is None else exported.refusal(spec)


def _bnb_refusal(place: Device) -> str | None:
    if place.kind == "mps":
        return "bitsandbytes does not support Apple GPUs."
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install bitsandbytes."
    return None
