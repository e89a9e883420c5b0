"""Estimates seconds per token of an offloaded model from the bytes to move and this machine's measured speeds.

Blocks are transferred while others compute, so a token takes as long as the slowest of disk, bus and computation.
Bandwidths come from `machine.bandwidth`, the speed of computing with stored weights from `probes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.machine import bandwidth
from lowmem.machine.rates import Again, correction, saved_rate
from lowmem.messages import msg
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.planning import model_bytes
from lowmem.planning.placement import block_index, read_per_token, stored_block_bytes
from lowmem.planning.plan import Plan

DENSE, STREAMED, RESIDENT = "plain", "streamed", "loaded"
"""Dense weights in the compute dtype; packed weights of streamed and of resident blocks. Other kinds are stored dtypes."""


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Estimated time of one pass, which generates a token for every sequence.

    Args:
        disk, bus, compute: seconds that each takes on its own.
        disk_bytes, bus_bytes: bytes moved per pass.
        disk_rate, bus_rate: bytes per second; 0 if not used.
        correction: by earlier runs, see `rates.learn`.
    """

    disk: float
    bus: float
    compute: float
    disk_bytes: int
    bus_bytes: int
    disk_rate: float
    bus_rate: float
    correction: float = 1.0

    @property
    def seconds_per_token(self) -> float:
        return max(self.disk, self.bus, self.compute) * self.correction

    @property
    def bound_by(self) -> str:
        """ "the disk", "the bus" or "the computation"."""
        return max((self.disk, msg("the disk")), (self.bus, msg("the bus")), (self.compute, msg("the computation")))[1]


def largest_file(folder: Path) -> Path | None:
    """The largest weight file in `folder`, with which the disk's speed is measured; None if there is none."""
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size, default=None)


def estimate_speed(plan: Plan, file: Path, again: Again = False) -> SpeedEstimate:
    """The estimated speed of `plan`, whose weights are on the same disk as `file`.

    Speeds that have not been measured yet are measured, which imports torch and takes a few seconds. With `again` True
    all are measured again; with None nothing is measured or imported.

    Raises:
        rates.Unmeasured: `again` is None and a speed has not been measured on this machine.
    """
    placement, kind = plan.placement, plan.place.kind
    sizes = stored_block_bytes(plan.spec)
    disk_bytes = bus_bytes = 0
    if placement is not None and not placement.mapped:
        disk_bytes = sum(sizes[index] for index in placement.indices("disk"))
        bus_bytes = sum(sizes[index] for index in placement.streamed(kind)) if kind != "cpu" else 0
    disk_rate = bandwidth.disk_bandwidth(file, again) if disk_bytes else 0.0
    bus_rate = bandwidth.bus_bandwidth(plan.device, again) if bus_bytes else 0.0
    return SpeedEstimate(
        disk_bytes / disk_rate if disk_rate else 0.0,
        bus_bytes / bus_rate if bus_rate else 0.0,
        _compute_seconds(plan, again),
        disk_bytes,
        bus_bytes,
        disk_rate,
        bus_rate,
        correction(action(plan)),
    )


def action(plan: Plan) -> str:
    """What is corrected by earlier runs."""
    return f"offload on {plan.place.kind}, {'mapped' if plan.placement and plan.placement.mapped else 'streamed'}"


def _compute_seconds(plan: Plan, again: Again) -> float:
    if plan.place.kind == "cpu":
        return _cpu_seconds(plan, again)
    return _gpu_seconds(plan, again) if plan.place.kind == "cuda" else 0.0


def _gpu_seconds(plan: Plan, again: Again) -> float:
    """Every weight is read from GPU memory once per token in its stored form, plus kernel launches per block."""
    stored_bytes = sum(share * tensor.nbytes for tensor, share in read_per_token(plan.spec))
    return stored_bytes / bandwidth.vram_bandwidth(plan.device, again) + plan.spec.layers / _blocks(plan.device, again)


def _cpu_seconds(plan: Plan, again: Again) -> float:
    """Every weight is read from RAM once per token, at the rate of the form it is held in."""
    dtype = model_bytes.compute_dtype(plan.precision, plan.place.dtypes)
    streamed = set(plan.placement.streamed("cpu")) if plan.placement else set()
    held: dict[str, int] = {}
    for tensor, share in read_per_token(plan.spec):
        if tensor.packed_layer and not tensor.is_packed_weight:
            continue  # of packed layers only the codes
        kind = _kind(plan, block_index(tensor.name) in streamed, tensor, dtype)
        # Resident dense weights are held in the compute dtype or in int8.
        size = model_bytes.tensor_bytes(plan.spec, tensor, plan.precision, dtype) if kind == DENSE else tensor.nbytes
        held[kind] = held.get(kind, 0) + int(share * size)
    rates = {kind: _rate(kind, plan, again) for kind in held}
    return sum(size / rates[kind] for kind, size in held.items()) + plan.spec.layers / _blocks("cpu", again)


def _kind(plan: Plan, streams: bool, tensor: Tensor, dtype: str) -> str:
    if tensor.packed_layer:
        return STREAMED if streams else RESIDENT
    return DENSE if plan.placement is None or tensor.dtype == dtype else tensor.dtype


def _rate(kind: str, plan: Plan, again: Again) -> float:
    """Bytes of one kind of weights per second, at the plan's batch size."""
    rows = 1 << (plan.batch - 1).bit_length()  # powers of two only, because each size is measured
    many = f"x{rows}" if rows > 1 else ""
    if kind == DENSE and not many:
        return bandwidth.ram_bandwidth(again, _inputs(plan.spec))
    if kind not in (STREAMED, RESIDENT):
        dtype = "fp32" if kind == DENSE else kind
        return saved_rate(f"{dtype}-weights{many}", again, lambda: _probes().dense_rate(dtype, rows))
    stored = plan.spec.stored
    assert stored is not None  # because weights are packed
    name = f"{kind} {stored.label} {stored.layout} {stored.desc_act}{many}"
    measure = "streamed_rate" if kind == STREAMED else "resident_rate"
    return saved_rate(name, again, lambda: getattr(_probes(), measure)(stored, rows))


def _inputs(spec: ModelSpec) -> int:
    """Input features typical of the model's matrices."""
    return min(bandwidth.INPUTS, max(256, 1 << spec.hidden.bit_length() - 1))


def _blocks(device: str, again: Again) -> float:
    return saved_rate(f"blocks {device}", again, lambda: _probes().block_rate(device))


def _probes() -> Any:
    from lowmem.offload import probes  # imports torch

    return probes
