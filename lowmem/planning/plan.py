"""The decision of how to run a model in a budget, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem.machine.budget import MemoryBudget
from lowmem.machine.device import Device
from lowmem.machine.hardware import Hardware
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec
from lowmem.planning.placement import Placement
from lowmem.precisions import PRECISIONS
from lowmem.units import format_bytes

BACKENDS = ("torch", "onnx")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an estimate: bytes of "weights", "kv", "activations", "scratch" or "overhead", and why."""

    key: str
    count: int
    why: str


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Predicted peak in one memory ("ram" or "vram"), line by line, and the budget for it; all in bytes."""

    memory: str
    lines: tuple[Line, ...]
    limit: int

    @property
    def peak(self) -> int:
        return sum(line.count for line in self.lines)

    @property
    def verdict(self) -> str:
        """ "fits", "tight" (above 90 % of the limit) or "over"."""
        if self.peak > self.limit:
            return "over"
        return "tight" if self.peak > 0.9 * self.limit else "fits"

    def share(self, key: str) -> int:
        return sum(line.count for line in self.lines if line.key == key)


@dataclass(frozen=True, slots=True)
class Declined:
    """An alternative that the planner considered, and why it chose another."""

    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model will be run.

    Args:
        spec: the model.
        hardware, budget: the machine, and the memory budget the plan was made for.
        precision: a key of `PRECISIONS`.
        device: torch device key, see `Device.key`.
        context: tokens (prompt and answer) the KV cache is planned for.
        batch: sequences at once.
        cache_type: data type of the KV cache: "same" as the computation, "int8", "int4", "int2", or "none" without a cache.
        prefill_chunk: prompt tokens per forward pass.
        placement: where each block lives; None if all are in the memory of the device that computes.
        estimates: predicted peak of "ram" and, on a GPU, of "vram".
        reason: why this plan, in sentences for a person.
        declined: the alternatives considered.
        backend: what computes: "torch", or "onnx" (ONNX Runtime, on CPUs).
        or_torch: whether torch may take over if no graph can be made: the planner chose the backend.
        window, sinks: latest and first tokens that stay cached; a window of 0 caches all.
        chat: prompts are conversations, whose template a process renders.
    """

    spec: ModelSpec
    hardware: Hardware
    budget: MemoryBudget
    precision: str
    device: str
    context: int
    batch: int
    cache_type: str
    prefill_chunk: int
    estimates: tuple[MemoryEstimate, ...] = ()
    reason: str = ""
    declined: tuple[Declined, ...] = ()
    backend: str = "torch"
    or_torch: bool = False
    window: int = 0
    sinks: int = 0
    chat: bool = False
    placement: Placement | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens per sequence that the KV cache has room for."""
        return min(self.context, self.window + self.sinks) if self.window else self.context

    def estimate(self, memory: str) -> MemoryEstimate | None:
        """The estimate for "ram" or "vram"; None for "vram" on a CPU."""
        return next((estimate for estimate in self.estimates if estimate.memory == memory), None)

    @property
    def place(self) -> Device:
        """The device that computes."""
        devices = (*self.hardware.gpus, self.hardware.cpu)
        return next(device for device in devices if device.key == self.device)

    @property
    def main(self) -> MemoryEstimate:
        """The estimate for the memory of the device that computes."""
        return self.estimate("vram") or self.estimates[0]

    @property
    def verdict(self) -> str:
        """The worst verdict of all estimates."""
        verdicts = {estimate.verdict for estimate in self.estimates}
        return next(v for v in ("over", "tight", "fits") if v in verdicts)

    @property
    def predicted(self) -> dict[str, int]:
        return {estimate.memory: estimate.peak for estimate in self.estimates}

    @property
    def precision_label(self) -> str:
        """The precision for a person; for a quantized checkpoint, its method and bits."""
        stored = self.spec.stored if self.precision == "stored" else None
        return stored.label if stored else PRECISIONS[self.precision].label

    def sentence(self) -> str:
        """The verdict for a person, with its numbers."""
        tightest = max(self.estimates, key=lambda estimate: estimate.peak / max(estimate.limit, 1))
        memory = msg("GPU memory") if tightest.memory == "vram" else "RAM"
        peak, limit = format_bytes(tightest.peak), format_bytes(tightest.limit)
        if tightest.verdict == "over":
            return msg(
                "Needs {peak} of {memory}, {difference} more than the budget of {limit}.",
                peak=peak,
                memory=memory,
                difference=format_bytes(tightest.peak - tightest.limit),
                limit=limit,
            )
        if tightest.verdict == "tight":
            return msg(
                "Tight: {peak} of the {limit} {memory} budget, {difference} to spare.",
                peak=peak,
                limit=limit,
                memory=memory,
                difference=format_bytes(tightest.limit - tightest.peak),
            )
        return msg("Fits: {peak} of the {limit} {memory} budget.", peak=peak, limit=limit, memory=memory)
