"""The jobs that run in a process of their own, by name: `python -m lowmem.jobs` is the child.

Whoever starts a job names it and knows nothing of the module that does it, as with any other program. So this table
stands above all layers, and a layer may start work that is implemented in one above it: the runtime has a graph exported.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from lowmem.machine.isolated import JobEvents, serve

JOBS = {
    "export": "lowmem.export.run:job",
    "measure_export": "lowmem.export.run:measure",
    "benchmark_graph": "lowmem.export.benchmark:job",
    "quantize": "lowmem.quant.run:job",
    "measure_quantize": "lowmem.quant.run:measure",
    "measure_variant": "lowmem.measure.job:measure",
    "draw_weights": "lowmem.plots.weights:job",
    "measure_strategy": "lowmem.longctx.job:measure_strategy",
    "offload": "lowmem.offload.run:job",
    "write_reference": "lowmem.verify.original:write_reference",
    "check_parity": "lowmem.verify.original:check_parity",
    "measure_offload": "lowmem.offload.run:measure_speeds",
}


def find(name: str) -> Callable[..., JobEvents]:
    """The generator function of a job: a name of `JOBS`, with torch imported, or "package.module:function"."""
    if name in JOBS:
        import_module("torch")
    module, _, function = JOBS.get(name, name).partition(":")
    found: Callable[..., JobEvents] = getattr(import_module(module), function)
    return found


if __name__ == "__main__":
    serve(find)
