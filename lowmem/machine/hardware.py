"""This machine: GPUs, RAM, disk, cores, and the kind of host. Never imports torch itself."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lowmem.machine.device import CPU, Device
from lowmem.messages import Message, join, msg
from lowmem.settings import settings
from lowmem.units import format_bytes

_HOSTS = {"colab": "Colab", "space": "Space", "zerogpu": "Space"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A snapshot of the machine, or a description of another one.

    Args:
        host: "local", "colab", "space" or "zerogpu".
        cpu: RAM and processor as a device.
        gpus: accelerators, best first; empty on a CPU machine.
        cores: cores this process may use; 0 if they are not known, as for a described machine.
        ram_limit: what set the RAM total: "host", "cgroup" or "MEMORY".
        disk_free_bytes, disk_path: the disk that stores models (`LOWMEM_HOME`).
        process_bytes: RAM this process holds (RSS).
        runtime_bytes: RAM that a process holds once torch and transformers are imported
            and before any model is loaded; measured on this machine, cached.
    """

    host: str
    cpu: Device
    gpus: tuple[Device, ...]
    cores: int
    ram_limit: str
    disk_free_bytes: int
    disk_path: str
    process_bytes: int
    runtime_bytes: int

    @property
    def described(self) -> bool:
        """Whether this is another machine, described by `describe_machine`: plans for it cannot be run here."""
        return self.cpu.rates is not None

    @property
    def device(self) -> Device:
        """The default device: the first GPU, else the CPU."""
        return self.gpus[0] if self.gpus else self.cpu

    def line(self) -> str:
        """The machine in one line for a person, e.g.
        "NVIDIA T4 · 15.6 GB VRAM · 12.7 GB RAM · 2 cores · Colab"."""
        ram = format_bytes(self.cpu.total_bytes)
        if self.device.kind == "cuda":
            name = (
                self.device.name
                if len(self.gpus) == 1
                else msg("{device} (1 of {gpus} GPUs)", device=self.device.name, gpus=len(self.gpus))
            )
            memories = [
                msg("{total_bytes} VRAM", total_bytes=format_bytes(self.device.total_bytes)),
                Message("{ram} RAM", ram=ram),
            ]
        elif self.device.kind == "mps":
            name, memories = self.device.name, [msg("{ram} shared RAM", ram=ram)]
        else:
            name, memories = self.cpu.name, [Message("{ram} RAM", ram=ram)]
        parts = [
            name,
            *memories,
            (msg("{cores} core", cores=self.cores) if self.cores == 1 else msg("{cores} cores", cores=self.cores))
            if self.cores
            else "",
            _HOSTS.get(self.host, ""),
            msg("not this machine") if self.described else "",
        ]
        return join(" · ", (part for part in parts if part))


def probe() -> Hardware:
    """Inspect the machine; fast enough to call on every page view."""
    # These describe parts of the machine with the dataclasses above.
    from lowmem.machine import baseline, gpu, memory_limits, processor

    here = settings()
    ram = memory_limits.ram()
    gpus, gpu_note = gpu.gpus()
    return Hardware(
        host=here.host,
        cpu=Device(
            key=CPU,
            name=processor.name(),
            total_bytes=ram.total_bytes,
            free_bytes=ram.free_bytes,
            dtypes=processor.dtypes(),
            note=join(" ", (note for note in (processor.note(), gpu_note) if note)),
        ),
        gpus=gpus or gpu.apple(ram),
        cores=processor.cores(),
        ram_limit=ram.limit,
        disk_free_bytes=disk_free_bytes(here.home),
        disk_path=str(here.home),
        process_bytes=memory_limits.process_bytes(),
        runtime_bytes=baseline.runtime_bytes(),
    )


def disk_free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
