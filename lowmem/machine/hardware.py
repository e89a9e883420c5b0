"""What this computer has: GPUs, RAM, disk, cores, the dtypes they run well, the kind of host.

Knows nothing about models. Imports torch only when somebody else already has.
"""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Device:
    """A place where a model can run.

    Args:
        key: torch's name for it: "cpu", "cuda:0", "mps".
        name: what people call it: "NVIDIA T4", "AMD EPYC".
        total_bytes, free_bytes: its memory. For CUDA free is
            free + reserved - active, since torch's cache can be reused; for the CPU it is RAM
            within the tightest of host, cgroup and `MEMORY`.
        dtypes: what it computes well, best first: "fp16", "bf16", "fp32".
        note: a limitation in one sentence, or "".
    """

    key: str
    name: str
    total_bytes: int
    free_bytes: int
    dtypes: tuple[str, ...]
    note: str = ""

    @property
    def kind(self) -> str:
        """"cpu", "cuda" or "mps"."""
        return self.key.split(":")[0]


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine at one moment.

    Args:
        host: "local", "colab", "space" or "zerogpu".
        cpu: RAM and processor as a device.
        gpus: accelerators, best first; empty on a CPU machine.
        cores: cores this process may use.
        ram_limit: what set the RAM total: "host", "cgroup" or "MEMORY".
        disk_free_bytes, disk_path: room where models are kept (`LOWMEM_HOME`).
        process_bytes: RAM this process holds already (RSS).
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
    def device(self) -> Device:
        """Where a model runs by default: the first GPU, else the CPU."""
        return self.gpus[0] if self.gpus else self.cpu

    def line(self) -> str:
        """The machine in one line for a person, e.g.
        "NVIDIA T4 · 15.6 GB VRAM · 12.7 GB RAM · 2 cores · Colab"."""
        raise NotImplementedError


def probe() -> Hardware:
    """Look at the machine. Cheap enough to call on every page view."""
    raise NotImplementedError
