"""Seconds per token of an offloaded model, from what must move and how fast this machine moves it.

A block's bytes arrive while others compute, so a token takes the longer of the two. Speeds are measured on this machine, see
`machine.bandwidth`; that of the arithmetic on stored weights is measured here, with the very layers that run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.machine import bandwidth
from lowmem.models.quantization import BNB, INT8
from lowmem.models.spec import CODE_DTYPES
from lowmem.planning import estimate
from lowmem.planning.placement import Placement, block_index, counted, stored_block_bytes
from lowmem.planning.plan import Plan

PROBE = 2048
"""Inputs and outputs of the layer that measures a kind of arithmetic."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What one token of one sequence is predicted to take, in seconds, and why.

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
        """ "the disk", "the bus" or "the processor"."""
        return max((self.disk, "the disk"), (self.bus, "the bus"), (self.compute, "the processor"))[1]


def predict(plan: Plan, file: Path, again: bool = False) -> Speed:
    """The speed of `plan`, whose weights lie on the disk of `file`. Imports torch; measures what was never measured."""
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
        _compute_seconds(plan, placement, again) if kind == "cpu" else 0.0,
        disk_bytes,
        bus_bytes,
        disk_rate,
        bus_rate,
    )


def _compute_seconds(plan: Plan, placement: Placement | None, again: bool) -> float:
    """Every weight passes through the processor once a token, at the rate of the form it is stored in."""
    dtype = estimate.compute_dtype(plan.precision, plan.place.dtypes)
    streamed = set(placement.streamed("cpu")) if placement else set()
    stored_bytes: dict[str, int] = {}
    for tensor in counted(plan.spec):
        index = block_index(tensor.name)
        if len(tensor.shape) < 2 or (index is None and not tensor.is_output_embedding and not plan.spec.tied):
            continue
        kind = _kind(plan, index in streamed, tensor.dtype, dtype)
        if tensor.packed_layer and not tensor.is_packed_weight:
            continue
        stored_bytes[kind] = stored_bytes.get(kind, 0) + tensor.nbytes
    rates = {kind: _rate(kind, plan, again) for kind in stored_bytes}
    seconds = sum(stored_bytes[kind] / rate for kind, rate in rates.items() if rate)
    blocks = bandwidth.kept("blocks", again, _block_rate)
    return seconds + (plan.spec.layers / blocks if blocks else 0.0)


def _block_rate() -> float:
    """Blocks per second that compute next to nothing: what Python and torch take for a block, whatever its size."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 8
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2
    )
    model, token = LlamaForCausalLM(config).eval(), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        return bandwidth.rate(lambda: model(token), layers)


def _kind(plan: Plan, streams: bool, stored: str, dtype: str) -> str:
    if plan.placement is None or stored == dtype:
        return "plain"
    if stored in ("int32", *CODE_DTYPES):
        return "packed" if streams else "plain"
    return stored


def _rate(kind: str, plan: Plan, again: bool) -> float:
    if kind == "plain":
        return bandwidth.ram_bandwidth(again)
    if kind == "packed":
        stored = plan.spec.stored
        assert stored is not None  # or nothing would be packed
        return bandwidth.kept(f"{stored.label} {stored.layout} {stored.desc_act}", again, lambda: _packed_rate(plan))
    return bandwidth.kept(f"{kind} weights", again, lambda: _stored_rate(kind))


def _stored_rate(dtype: str) -> float:
    import torch

    from lowmem.models.checkpoint import TORCH_DTYPES
    from lowmem.offload.layers import StoredLinear

    layer = StoredLinear(torch.zeros(4 * PROBE, PROBE, dtype=TORCH_DTYPES[dtype]), None)
    row = torch.zeros(1, PROBE)
    return bandwidth.rate(lambda: layer(row), int(layer.weight.nbytes))


def _packed_rate(plan: Plan) -> float:
    """Bytes of codes per second."""
    import torch

    from lowmem.offload.layers import StoredPacked

    stored = plan.spec.stored
    assert stored is not None  # see `_rate`
    if stored.method in (INT8, BNB):
        return _stored_rate("int8") if stored.bits == 8 else _nf4_rate(stored.layout)
    layer = StoredPacked(stored, "probe", PROBE, 4 * PROBE)
    groups = stored.groups(PROBE)
    for part, shape, dtype in (
        ("qweight", stored.qweight_shape(4 * PROBE, PROBE), torch.int32),
        ("qzeros", (groups, -(-4 * PROBE * stored.bits // 32)), torch.int32),
        ("scales", (groups, 4 * PROBE), torch.float16),
    ):
        setattr(layer, part, torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))
    if stored.desc_act:
        layer.g_idx = torch.nn.Parameter(
            torch.arange(PROBE, dtype=torch.int32) // (PROBE // groups), requires_grad=False
        )
    row = torch.zeros(1, PROBE)
    return bandwidth.rate(lambda: layer(row), layer.qweight.nbytes)


def _nf4_rate(layout: str) -> float:
    import torch

    from lowmem.offload.layers import StoredNf4
    from lowmem.quant.bnb_linear import packed4, stored4

    weight = torch.zeros(4 * PROBE, PROBE)
    made: Any = stored4(
        "probe", packed4(weight, 64, layout, True, "float32").tensors, 4 * PROBE, PROBE, weight.device, weight.dtype
    )
    layer = StoredNf4(made.weight.data, made.weight.quant_state, PROBE, 4 * PROBE)
    row = torch.zeros(1, PROBE)
    return bandwidth.rate(lambda: layer(row), layer.weight.nbytes)
