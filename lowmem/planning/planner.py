"""Choose model, precision and context for a machine and a budget, and say why."""

from __future__ import annotations

from lowmem.machine.hardware import Hardware
from lowmem.models.spec import ModelSpec
from lowmem.planning.goal import Goal, Limits
from lowmem.planning.plan import Plan


def plan(spec: ModelSpec | None, hardware: Hardware, limits: Limits, goal: Goal = Goal()) -> Plan:
    """The best plan for `spec`, or for the best catalog model when `spec` is None. Always returns one; see its `verdict`."""
    raise NotImplementedError


def available(precision: str, hardware: Hardware, device: str = "auto") -> str | None:
    """None when the precision runs on the machine, else why not (for a greyed-out choice)."""
    raise NotImplementedError
