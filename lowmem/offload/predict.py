"""Seconds per token of an offloaded model, from what must move and how fast this machine moves it.

A block's bytes arrive while others compute, so a token takes the longer of the two. Speeds are measured on this machine, see
`machine.bandwidth`; those of the arithmetic on stored weights with the very layers that run, see `probes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.machine import bandwidth
from lowmem.models.spec import ModelSpec, Tensor
from lowmem.planning import model_bytes
from lowmem.planning.placement import block_index, counted, stored_block_bytes
from lowmem.planning.plan import Plan

PLAIN, STREAMED, HOME = "plain", "streamed", "loaded"
"""Weights in the dtype of the computation, and codes as they are stored or as they were loaded; other kinds are dtypes."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What a pass, a token of every sequence, is predicted to take, in seconds, and why.

    Args:
        disk, bus, compute: seconds each would take alone.
        disk_bytes, bus_bytes: what one pass moves.
        disk_rate, bus_rate: bytes per second, 0 where nothing was asked of it.
    """

    disk: float
    bus: float
    compute: float
    disk_bytes: int
    bus_bytes: int
    disk_rate: float
    bus_rate: float

    @property
    def seconds_per_token(self) -> float:
        return max(self.disk, self.bus, self.compute)

    @property
    def bound_by(self) -> str:
        """ "the disk", "the bus" or "the computation"."""
        return max((self.disk, "the disk"), (self.bus, "the bus"), (self.compute, "the computation"))[1]


def weights(folder: Path) -> Path | None:
    """The file of a model that its disk is measured with: the largest. None where there is none."""
    return max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size, default=None)


def predict(plan: Plan, file: Path, again: bandwidth.Again = False) -> Speed:
    """The speed of `plan`, whose weights lie on the disk of `file`.

    Measuring imports torch and takes some seconds; with `again` None nothing is measured, and nothing imported.

    Raises:
        bandwidth.Unmeasured: `again` is None, and something was never measured here.
    """
    placement, kind = plan.placement, plan.place.kind
    sizes = stored_block_bytes(plan.spec)
    disk_bytes = bus_bytes = 0
    if placement is not None and not placement.mapped:
        disk_bytes = sum(sizes[index] for index in placement.indices("disk"))
        bus_bytes = sum(sizes[index] for index in placement.streamed(kind)) if kind != "cpu" else 0
    disk_rate = bandwidth.disk_bandwidth(file, again) if disk_bytes else 0.0
    bus_rate = bandwidth.bus_bandwidth(plan.device, again) if bus_bytes else 0.0
    return Speed(
        disk_bytes / disk_rate if disk_rate else 0.0,
        bus_bytes / bus_rate if bus_rate else 0.0,
        _compute_seconds(plan, again),
        disk_bytes,
        bus_bytes,
        disk_rate,
        bus_rate,
    )


def _compute_seconds(plan: Plan, again: bandwidth.Again) -> float:
    if plan.place.kind == "cpu":
        return _cpu_seconds(plan, again)
    return _gpu_seconds(plan, again) if plan.place.kind == "cuda" else 0.0


def _gpu_seconds(plan: Plan, again: bandwidth.Again) -> float:
    """Every weight passes through the GPU once a token, as many bytes as it is stored in; and each block takes its launches."""
    stored_bytes = sum(tensor.nbytes for tensor in _multiplied(plan.spec))
    return stored_bytes / bandwidth.vram_bandwidth(plan.device, again) + plan.spec.layers / _blocks(plan.device, again)


def _cpu_seconds(plan: Plan, again: bandwidth.Again) -> float:
    """Every weight passes through the processor once a token, at the rate of the form it is held in."""
    dtype = model_bytes.compute_dtype(plan.precision, plan.place.dtypes)
    streamed = set(plan.placement.streamed("cpu")) if plan.placement else set()
    held: dict[str, int] = {}
    for tensor in _multiplied(plan.spec):
        kind = _kind(plan, block_index(tensor.name) in streamed, tensor, dtype)
        # Dense weights that are loaded for good are held in another dtype, or in int8.
        size = model_bytes.tensor_bytes(plan.spec, tensor, plan.precision, dtype) if kind == PLAIN else tensor.nbytes
        held[kind] = held.get(kind, 0) + size
    rates = {kind: _rate(kind, plan, again) for kind in held}
    return sum(size / rates[kind] for kind, size in held.items()) + plan.spec.layers / _blocks("cpu", again)


def _multiplied(spec: ModelSpec) -> list[Tensor]:
    """The matrices that every token is multiplied by: of an embedding it takes one row, of packed layers codes count."""
    return [
        tensor
        for tensor in counted(spec)
        if len(tensor.shape) > 1
        and (block_index(tensor.name) is not None or tensor.is_output_embedding or spec.tied)
        and (tensor.is_packed_weight or not tensor.packed_layer)
    ]


def _kind(plan: Plan, streams: bool, tensor: Tensor, dtype: str) -> str:
    if tensor.packed_layer:
        return STREAMED if streams else HOME
    return PLAIN if plan.placement is None or tensor.dtype == dtype else tensor.dtype


def _rate(kind: str, plan: Plan, again: bandwidth.Again) -> float:
    """Bytes per second of one kind of weights, for a token of every sequence of the plan."""
    rows = 1 << (plan.batch - 1).bit_length()  # few sizes are enough, and each is measured once
    many = f"x{rows}" if rows > 1 else ""
    if kind == PLAIN and not many:
        return bandwidth.ram_bandwidth(again, _inputs(plan.spec))
    if kind not in (STREAMED, HOME):
        dtype = "fp32" if kind == PLAIN else kind
        return bandwidth.kept(f"{dtype}-weights{many}", again, lambda: _probes().dense_rate(dtype, rows))
    stored = plan.spec.stored
    assert stored is not None  # or nothing would be packed
    name = f"{kind} {stored.label} {stored.layout} {stored.desc_act}{many}"
    measure = "streamed_rate" if kind == STREAMED else "home_rate"
    return bandwidth.kept(name, again, lambda: getattr(_probes(), measure)(stored, rows))


def _inputs(spec: ModelSpec) -> int:
    """About what most of the model's matrices have."""
    return min(bandwidth.INPUTS, max(256, 1 << spec.hidden.bit_length() - 1))


def _blocks(device: str, again: bandwidth.Again) -> float:
    return bandwidth.kept(f"blocks {device}", again, lambda: _probes().block_rate(device))


def _probes() -> Any:
    from lowmem.offload import probes  # which brings torch

    return probes
