"""The GPUs of this machine: through NVML, or through torch if it is already loaded.

Never imports torch and never initializes CUDA. Device numbers follow NVML's order, which is CUDA's with
CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lowmem.machine import processor
from lowmem.machine.device import Device
from lowmem.machine.memory_limits import Ram
from lowmem.messages import msg
from lowmem.settings import settings
from lowmem.units import GB

log = logging.getLogger("lowmem.machine")

# A ZeroGPU Space attaches half an RTX Pro 6000 Blackwell; in its main process CUDA is emulated, with made-up figures.
ZEROGPU = Device(
    key="cuda:0",
    name="ZeroGPU",
    total_bytes=48 * GB,
    free_bytes=48 * GB,
    dtypes=("bf16", "fp16", "fp32"),
    note=msg("Attached only while an action runs."),
)


def gpus() -> tuple[tuple[Device, ...], str]:
    """The GPUs that torch can use, largest first, and a note on those it cannot."""
    if settings().host == "zerogpu":
        return (ZEROGPU,), ""
    found = _from_nvml() or _from_torch()
    if found and not _torch_reaches_gpus():
        return (), msg(
            "There is an {found}, but this PyTorch cannot use it: it needs a build with CUDA.", found=found[0].name
        )
    return tuple(sorted(found, key=lambda device: -device.total_bytes)), ""


def apple(ram: Ram) -> tuple[Device, ...]:
    """The GPU of an Apple chip, which shares the RAM; empty on other machines."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return ()
    note = msg("Shares its memory with everything else on this machine.")
    return (Device("mps", processor.name(), ram.total_bytes, ram.free_bytes, ("fp16", "fp32"), note),)


def loaded_torch() -> ModuleType | None:
    """torch if it is fully imported; another thread may still be importing it."""
    torch = sys.modules.get("torch")
    spec = getattr(torch, "__spec__", None)
    return torch if spec is not None and not getattr(spec, "_initializing", False) else None


def torch_with_cuda() -> Any | None:
    """torch if it has initialized CUDA, else None."""
    torch = loaded_torch()
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _from_nvml() -> list[Device]:
    nvml = _nvml()
    if nvml is None:
        return []
    try:
        return [_described(nvml, index, handle) for index, handle in enumerate(_visible(nvml))]
    except nvml.NVMLError as error:
        log.info("NVML does not describe this GPU: %s", error)
        return []


@functools.cache
def _nvml() -> Any | None:
    """The initialized NVML, None without the package or a driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _visible(nvml: Any) -> Iterator[Any]:
    """Handles in the order of CUDA_VISIBLE_DEVICES: numbers or (the start of) UUIDs."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    wanted = settings().visible_gpus
    if wanted is None:
        yield from handles
        return
    for token in (part.strip() for part in wanted.split(",")):
        if token.isdigit():
            matches = handles[int(token) : int(token) + 1]
        elif token.startswith("MIG-"):
            matches = [nvml.nvmlDeviceGetHandleByUUID(token)]
        else:
            matches = [handle for handle in handles if token and nvml.nvmlDeviceGetUUID(handle).startswith(token)]
        if not matches:
            return  # CUDA too ignores everything from the first entry that names no GPU
        yield matches[0]


def _described(nvml: Any, index: int, handle: Any) -> Device:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2)
        total = memory.total - memory.reserved
    except nvml.NVMLError:  # a driver before 510 counts what it reserves as used
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total = memory.total
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return _device(index, nvml.nvmlDeviceGetName(handle), total, memory.free, tuple(capability))


def _from_torch() -> list[Device]:
    """GPUs that NVML does not support: AMD, Jetson."""
    torch = loaded_torch()
    if torch is None or not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = torch.cuda.get_device_capability(index)
        devices.append(_device(index, torch.cuda.get_device_name(index), total, free, capability))
    return devices


def _device(index: int, name: str, total: int, free: int, capability: tuple[int, ...]) -> Device:
    free = min(total, free + _reusable_bytes(index))
    dtypes, note = dtypes_of(capability)
    return Device(f"cuda:{index}", _clean(name), total, free, dtypes, note, capability)


def dtypes_of(capability: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """The dtypes that a GPU of this compute capability runs well, best first, and a note on what it lacks."""
    if capability >= (8, 0):
        return ("bf16", "fp16", "fp32"), ""
    version = ".".join(map(str, capability))
    note = msg("bf16 is not supported: it needs compute capability 8.0, this GPU has {version}.", version=version)
    return ("fp16", "fp32"), note


def _reusable_bytes(index: int) -> int:
    """Bytes that torch's allocator has reserved on a GPU but does not use."""
    torch = torch_with_cuda()
    if torch is None:
        return 0
    active = torch.cuda.memory_stats(index).get("active_bytes.all.current", 0)
    return max(0, torch.cuda.memory_reserved(index) - active)


def _clean(name: str) -> str:
    """ "Tesla T4" -> "NVIDIA T4"."""
    return re.sub(r"^(NVIDIA )?(Tesla |(?=GeForce|Quadro))", "NVIDIA ", name)


def _torch_reaches_gpus() -> bool:
    torch = loaded_torch()
    return torch.cuda.is_available() if torch is not None else _torch_built_for_gpus()


@functools.cache
def _torch_built_for_gpus() -> bool:
    """Whether the installed torch can drive a GPU, read from its version file; True when there is no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return True
    return re.search(r"^(cuda|hip)\b[^=\n]*=\s*['\"]", text, flags=re.MULTILINE) is not None
