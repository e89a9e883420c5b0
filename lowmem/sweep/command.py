"""`python -m lowmem compare --grid grid.yaml`: a sweep on the command line."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem.errors import BadInput
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.sweep.grid import read_grid
from lowmem.sweep.run import sweep
from lowmem.units import parse_bytes

if TYPE_CHECKING:
    from lowmem.measure.command import Shown


def run_grid(args: argparse.Namespace, shown: Shown) -> int:
    """Run the sweep that the flags of `compare` describe.

    Raises:
        LowMemError: see `sweep`.
    """
    if args.model:
        raise BadInput(f"The grid names the models, so {args.model[:40]} is one too many.", "Leave it out.")
    grid = read_grid(args.grid)
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    grid = replace(grid, ram=ram or grid.ram, vram=vram or grid.vram)
    measure_runtime_bytes()
    for event in sweep(grid, args.out, workers=args.workers, ray=args.ray):
        shown.take(event)
    return 0
