"""A device that computes: its memory and the dtypes it runs well."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Rates:
    """The bandwidths of a described device in bytes per second: the least and the most it may have.

    Args:
        memory: of its memory.
        bus: from RAM to a GPU; zero for a CPU.
    """

    memory: tuple[float, float]
    bus: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Device:
    """A device that a model can run on.

    Args:
        key: torch's name for it: "cpu", "cuda:0", "mps".
        name: its product name: "NVIDIA T4", "AMD EPYC".
        total_bytes, free_bytes: its memory. For CUDA free is
            free + reserved - active, since torch's cache can be reused; for the CPU it is RAM
            within the tightest of host, cgroup and `MEMORY`.
        dtypes: those it runs well, best first: "fp16", "bf16", "fp32".
        note: a limitation in one sentence, or "".
        capability: CUDA compute capability, (7, 5) for example; () if the device has none.
        rates: bandwidths of a described device; None for a device of this machine, which is measured instead.
    """

    key: str
    name: str
    total_bytes: int
    free_bytes: int
    dtypes: tuple[str, ...]
    note: str = ""
    capability: tuple[int, ...] = ()
    rates: Rates | None = None

    @property
    def kind(self) -> str:
        """ "cpu", "cuda" or "mps"."""
        return self.key.split(":")[0]
