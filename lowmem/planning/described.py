"""Plans for a described machine (`machine.described`): what would run there, how fast, and what to install.

A token reads every weight once, so its time follows from bytes and bandwidths. Between the specified bandwidth of a card
and what a model gets lies a factor that depends on kernels, host and driver; it is given as a range, from which the range of
tokens per second follows:

- Weights and KV cache are read from GPU memory at a share of its bandwidth (`EFFICIENCY`), and every block adds the time in
  which Python and the driver launch its kernels (`BLOCK_SECONDS`). At one token per pass the launches of a small model take
  longer than its bytes, which is why a card with ten times the bandwidth is not ten times as fast.
- Offloaded blocks move as stored, over PCI Express and from disk. The fast end has them fully overlapped with computing, so
  the slowest of the three counts; the slow end overlaps nothing, so all three add up.

The shares cover published measurements of transformers' eager mode: Qwen2.5-0.5B with its 24 blocks on Colab's T4 decodes 24
tokens/s in fp16 and 6 with LLM.int8 (dohu012/llm-quantization-benchmark), near the slow end, since Colab's cores launch slowly.
None of them has been measured with lowmem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowmem.errors import BadInput, Unsupported
from lowmem.machine.budget import UNLIMITED, MemoryBudget
from lowmem.machine.hardware import Hardware
from lowmem.messages import Message, msg
from lowmem.models.quantization import BNB
from lowmem.models.spec import ModelSpec
from lowmem.planning import cache, offloading
from lowmem.planning.fallback import quantized_kv
from lowmem.planning.goal import Goal
from lowmem.planning.model_bytes import bytes_per_token, compute_dtype
from lowmem.planning.placement import Placement, all_resident, stored_block_bytes
from lowmem.planning.plan import Declined, Plan
from lowmem.planning.planner import DEFAULT_GOAL, title
from lowmem.planning.planner import plan as make_plan

SLOW, FAST = 0, 1
"""The ends of a range: indices of the pairs below."""

EFFICIENCY = {"bnb8": (0.25, 0.7), "nf4": (0.25, 0.7), "stored": (0.15, 0.7)}
DENSE_EFFICIENCY = (0.5, 0.9)
"""Share of the memory's bandwidth that matrix products of one row reach."""

BLOCK_SECONDS = {"bnb8": (7e-3, 1.2e-3), "nf4": (3e-3, 0.4e-3), "stored": (5e-3, 0.5e-3)}
DENSE_BLOCK_SECONDS = (1.8e-3, 0.3e-3)
"""Time to launch the kernels of one decoder block."""

BUS_EFFICIENCY = (0.4, 0.85)
"""Share of the specified bandwidth of PCI Express; the slow end is a slot of half the lanes, or of the generation before."""

DISK_RATE = (0.5e9, 3.0e9)
"""Bytes per second of a SATA and of an NVMe solid-state disk."""

TORCH, BITSANDBYTES = "torch>=2.8,<2.14", "bitsandbytes>=0.49"
"""As in requirements.txt."""


@dataclass(frozen=True, slots=True)
class ExpectedSpeed:
    """Expected tokens per second: the slow and the fast end, and what bounds the fast one."""

    low: float
    high: float
    bound_by: str

    def text(self) -> str:
        """ "20 to 90 tokens/s, limited by the GPU"."""
        return msg("{range}, limited by {bound_by}", range=self.short(), bound_by=self.bound_by)

    def short(self) -> str:
        """ "20 to 90 tok/s"."""
        return Message("{range} tok/s", range=self.range())

    def range(self) -> str:
        """ "20 to 90"."""
        return msg("{low} to {high}", low=_digits(self.low), high=_digits(self.high))

    @property
    def middle(self) -> float:
        """The geometric mean: as many times faster than `low` as it is slower than `high`."""
        return (self.low * self.high) ** 0.5


@dataclass(frozen=True, slots=True)
class DescribedPlan:
    """A plan for a machine that is not here.

    Args:
        plan: its `hardware` is described; sessions refuse to load it.
        speed: None if the plan is over its budget.
        install: the command that installs what the plan needs there, in lowmem's folder.
    """

    plan: Plan
    speed: ExpectedSpeed | None
    install: str

    @property
    def placement(self) -> Placement:
        """The place of every block."""
        return self.plan.placement or all_resident(self.plan.spec, self.plan.place.kind)

    @property
    def not_here(self) -> str:
        """That it cannot be run here, in a sentence."""
        return not_here(self.plan.hardware)


def not_here(hardware: Hardware) -> str:
    """That a plan for this machine cannot be run here."""
    return msg("A plan for another machine ({name}): it cannot be run here.", name=hardware.device.name)


def _digits(speed: float) -> str:
    """Two significant digits, which is more than a range has."""
    rounded = float(f"{speed:.2g}")
    return Message("{speed:,.0f}" if rounded >= 10 else "{speed:.1f}" if rounded >= 1 else "{speed:.2f}", speed=rounded)


def plan_described(
    spec: ModelSpec | None, hardware: Hardware, goal: Goal = DEFAULT_GOAL, budget: MemoryBudget = UNLIMITED
) -> DescribedPlan:
    """The best plan for `spec`, or for the best model of the catalog if it is None, on a described machine.

    A model that fits in no precision gets a quantized KV cache if that is enough, which costs little speed; else its blocks
    are spread over GPU memory, RAM and disk.

    Args:
        hardware: from `describe_machine`.
        budget: lowers the limits further.

    Raises:
        BadInput: `hardware` is this machine, whose speed is measured instead.
        BadInput, Unsupported: see `planner.plan`.
    """
    if not hardware.described:
        raise BadInput(msg("This machine is not described."), msg("Plan for it with lowmem.plan."))
    found = make_plan(spec, hardware, budget.bounded(hardware), goal)
    if found.verdict == "over":
        found = _cache_quantized(found) or _offloaded(found) or found
    return DescribedPlan(found, None if found.verdict == "over" else expected_speed(found), install_command(found))


def _cache_quantized(plan: Plan) -> Plan | None:
    smaller = quantized_kv(plan)
    if smaller is None or smaller.verdict == "over":
        return None
    reason = msg("{precision_label} fits with its KV cache in int8.", precision_label=plan.precision_label)
    return replace(smaller, reason=reason, declined=plan.declined)


def _offloaded(plan: Plan) -> Plan | None:
    spread = offloading.offloaded(plan)
    if spread is None or spread.placement is None:
        return None
    reason = msg("Too large to be resident: {placement}.", placement=spread.placement.sentence())
    return replace(spread, reason=reason, declined=(*plan.declined, Declined(title(plan), plan.sentence())))


def refuse_described(plan: Plan) -> None:
    """
    Raises:
        Unsupported: the plan is for a described machine.
    """
    if plan.hardware.described:
        raise Unsupported(not_here(plan.hardware), msg("Plan for this machine to load the model."))


def expected_speed(plan: Plan) -> ExpectedSpeed:
    """The expected decoding speed of a plan for a described machine, all sequences of its batch together."""
    (slow, _), (fast, bound_by) = (_pass_seconds(plan, end) for end in (SLOW, FAST))
    return ExpectedSpeed(plan.batch / slow, plan.batch / fast, bound_by)


def _pass_seconds(plan: Plan, end: int) -> tuple[float, str]:
    """Seconds of one pass at one end of the range, and what bounds it."""
    rates, sizes, placement = plan.place.rates, stored_block_bytes(plan.spec), plan.placement
    assert rates is not None  # the machine is described
    on_disk = sum(sizes[index] for index in placement.indices("disk")) if placement else 0
    moved = sum(sizes[index] for index in placement.streamed(plan.place.kind)) if placement else 0
    efficiency = EFFICIENCY.get(plan.precision, DENSE_EFFICIENCY)[end]
    launching = BLOCK_SECONDS.get(plan.precision, DENSE_BLOCK_SECONDS)[end] * plan.spec.layers
    parts = {
        msg("the GPU") if plan.place.kind == "cuda" else msg("the CPU"): (
            _read_bytes(plan, end) / (rates.memory[end] * efficiency) + launching
        ),
        msg("the bus"): moved / (rates.bus[end] * BUS_EFFICIENCY[end]) if rates.bus[end] else 0.0,
        msg("the disk"): on_disk / DISK_RATE[end],
    }
    longest = max(parts, key=parts.__getitem__)
    return (sum(parts.values()) if end == SLOW else parts[longest]), longest


def _read_bytes(plan: Plan, end: int) -> int:
    """Bytes of device memory that a pass reads: matrices in the form they are held in, and at the slow end a full cache."""
    dtype = compute_dtype(plan.precision, plan.place.dtypes)
    weights = bytes_per_token(plan.spec, plan.precision, dtype)
    return weights + (cache.plan_bytes(plan, dtype) if end == SLOW else 0)


def install_command(plan: Plan) -> str:
    """The command that installs torch for the plan's GPU, bitsandbytes if its precision needs it, and lowmem.

    PyTorch's wheels for CUDA 12.6 support compute capability 5.0 to 9.0, those for CUDA 12.8 also 10.0 and 12.0.
    """
    if plan.place.kind != "cuda":
        return f'pip install "{TORCH}" --index-url https://download.pytorch.org/whl/cpu && pip install .'
    cuda = "cu128" if plan.place.capability >= (10, 0) else "cu126"
    stored = plan.spec.stored if plan.precision == "stored" else None
    bitsandbytes = (
        f' "{BITSANDBYTES}"' if plan.precision in ("bnb8", "nf4") or (stored and stored.method == BNB) else ""
    )
    return f'pip install "{TORCH}" --index-url https://download.pytorch.org/whl/{cuda} && pip install .{bitsandbytes}'


def as_dict(found: DescribedPlan) -> dict[str, object]:
    """What is particular to a described plan, for JSON."""
    blocks = found.placement.blocks
    speed = found.speed
    return {
        "runs_here": False,
        "note": found.not_here,
        "machine": found.plan.hardware.line(),
        "blocks": {place: blocks.count(place) for place in ("gpu", "ram", "disk")},
        "tokens_per_second": {"low": speed.low, "middle": speed.middle, "high": speed.high} if speed else None,
        "bound_by": speed.bound_by if speed else None,
        "install": found.install,
    }
