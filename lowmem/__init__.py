"""lowmem: language models on machines with little memory, within an enforced memory budget.

    from pathlib import Path
    import lowmem
    session = lowmem.Session()
    hardware = session.hardware()
    plan = lowmem.plan(lowmem.read_spec("demo"), hardware, lowmem.MemoryBudget.detect(hardware))
    for event in session.load(plan): ...
    for event in session.generate("Hello", lowmem.GenerateOptions()): ...
    for event in lowmem.quantize(lowmem.QuantizeRequest.validated("demo", "gptq", out=Path("demo-gptq"))): ...
    for event in lowmem.export_model(lowmem.ExportRequest("demo", Path("demo-onnx"))): ...

Names are imported on first use: `import lowmem` brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowmem.version import __version__

_HOME_OF = {
    "CancelToken": "lowmem.events",
    "Chunk": "lowmem.events",
    "Completion": "lowmem.events",
    "ExportOptions": "lowmem.planning.graph_options",
    "ExportRequest": "lowmem.export.request",
    "GenerateOptions": "lowmem.generate.options",
    "Goal": "lowmem.planning.goal",
    "Hardware": "lowmem.machine.hardware",
    "LowMemError": "lowmem.errors",
    "MemoryBudget": "lowmem.machine.budget",
    "ModelSpec": "lowmem.models.spec",
    "Plan": "lowmem.planning.plan",
    "QuantizeRequest": "lowmem.quant.request",
    "Receipt": "lowmem.events",
    "Session": "lowmem.runtime.session",
    "Step": "lowmem.events",
    "describe_machine": "lowmem.machine.described",
    "export_model": "lowmem.export.run",
    "plan": "lowmem.planning.planner",
    "plan_described": "lowmem.planning.described",
    "probe": "lowmem.machine.hardware",
    "quantize": "lowmem.quant.run",
    "read_spec": "lowmem.models.source",
}

__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from lowmem.errors import LowMemError
    from lowmem.events import CancelToken, Chunk, Completion, Receipt, Step
    from lowmem.export.request import ExportRequest
    from lowmem.export.run import export_model
    from lowmem.generate.options import GenerateOptions
    from lowmem.machine.budget import MemoryBudget
    from lowmem.machine.described import describe_machine
    from lowmem.machine.hardware import Hardware, probe
    from lowmem.models.source import read_spec
    from lowmem.models.spec import ModelSpec
    from lowmem.planning.described import plan_described
    from lowmem.planning.goal import Goal
    from lowmem.planning.graph_options import ExportOptions
    from lowmem.planning.plan import Plan
    from lowmem.planning.planner import plan
    from lowmem.quant.request import QuantizeRequest
    from lowmem.quant.run import quantize
    from lowmem.runtime.session import Session


def __getattr__(name: str) -> Any:
    if name in ("Limits", "limits_from"):  # the names of an earlier release
        return _renamed(name)
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lowmem' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def _renamed(name: str) -> Any:
    from warnings import warn

    from lowmem.machine.budget import MemoryBudget

    if name == "Limits":
        warn("lowmem.Limits is now lowmem.MemoryBudget.", DeprecationWarning, stacklevel=3)
        return MemoryBudget
    warn("lowmem.limits_from(...) is now lowmem.MemoryBudget(...).bounded(hardware).", DeprecationWarning, stacklevel=3)
    return lambda hardware, ram=None, vram=None: MemoryBudget(ram, vram).bounded(hardware)
