"""Which precisions run on which device, and in what order to prefer them."""

from __future__ import annotations

import importlib.util
import platform

from lowmem.machine.hardware import Device, Hardware
from lowmem.planning.plan import PRECISIONS


def available(precision: str, hardware: Hardware, device: str = "auto") -> str | None:
    """None when `precision` runs on the device, else the reason it does not."""
    place = device_of(hardware, device)
    if precision not in PRECISIONS:
        return f"There is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}."
    if precision in ("fp16", "bf16"):
        return _half_refusal(precision, place)
    if precision == "int8":
        return _int8_refusal(place)
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


def candidates(hardware: Hardware, device: Device) -> tuple[str, ...]:
    """Precisions worth choosing automatically, best first.

    A GPU loses quality step by step: half precision, 8 bits, 4 bits. On a CPU dynamic int8 is
    both the fastest and nearly exact, so it comes before the wider ones.
    """
    if device.kind == "cpu":
        order: tuple[str, ...] = ("int8", "bf16", "fp32", "nf4")
    elif device.kind == "cuda":
        order = (device.dtypes[0], "bnb8", "nf4")
    else:
        order = (device.dtypes[0],)
    return tuple(p for p in order if available(p, hardware, device.key) is None)


def _half_refusal(precision: str, place: Device) -> str | None:
    if place.kind == "cpu":
        # fp16 has no fast CPU kernels in torch; bf16 does, and where it is slow it still halves the memory.
        return "fp16 is slow and imprecise on CPUs; use bf16 or int8." if precision == "fp16" else None
    return None if precision in place.dtypes else f"{place.name} does not support {precision}."


def _int8_refusal(place: Device) -> str | None:
    if place.kind != "cpu":
        return "Dynamic int8 is a CPU method; on a GPU use 8-bit or 4-bit bitsandbytes."
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "Dynamic int8 needs an x86 processor."
    return None


def _bnb_refusal(place: Device) -> str | None:
    if place.kind == "mps":
        return "bitsandbytes does not support Apple GPUs."
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed: pip install bitsandbytes."
    return None
