"""The table of what runs on GPUs of 4 to 24 GB: models of the catalog against sizes, each cell a plan."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lowmem.machine.described import describe_machine
from lowmem.messages import Message, msg
from lowmem.models.catalog import CATALOG
from lowmem.models.spec import ModelSpec
from lowmem.planning.described import DescribedPlan, ExpectedSpeed, plan_described
from lowmem.planning.goal import Goal
from lowmem.planning.planner import DEFAULT_GOAL
from lowmem.units import GB

SIZES_GB = (4, 6, 8, 12, 16, 24)


@dataclass(frozen=True, slots=True)
class Cell:
    """The best plan for one model on a GPU of one size.

    Args:
        parameters: of the model.
        vram_gb: memory of the GPU.
        precision: what the model would run in, or what comes nearest to fitting.
        gpu_blocks, ram_blocks, disk_blocks: where the decoder blocks live.
        vram_bytes, ram_bytes: predicted peaks.
        speed: None if not even one block at a time fits.
    """

    model: str
    parameters: int
    vram_gb: int
    precision: str
    gpu_blocks: int
    ram_blocks: int
    disk_blocks: int
    vram_bytes: int
    ram_bytes: int
    speed: ExpectedSpeed | None

    @property
    def blocks(self) -> int:
        return self.gpu_blocks + self.ram_blocks + self.disk_blocks

    @property
    def offloaded(self) -> bool:
        return self.gpu_blocks < self.blocks

    def text(self) -> str:
        """ "fp16 · 20 to 90" tokens/s; the blocks on the GPU where the others are offloaded: "3 of 28 · 0.49 to 2.3"."""
        if self.speed is None:
            return msg("doesn't fit")
        held = msg("{gpu} of {blocks}", gpu=self.gpu_blocks, blocks=self.blocks) if self.offloaded else self.precision
        return Message("{held} · {speed}", held=held, speed=self.speed.range())

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for CSV and JSON."""
        low, high = (self.speed.low, self.speed.high) if self.speed else (0.0, 0.0)
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "speed"}
        return values | {"fits": self.speed is not None, "low_tps": round(low, 2), "high_tps": round(high, 2)}


def what_runs(
    ram: str | float | None = None, goal: Goal = DEFAULT_GOAL, specs: Sequence[ModelSpec] | None = None
) -> list[Cell]:
    """All cells, model by model from the smallest, each from 4 to 24 GB; takes about 3 s for the catalog.

    Args:
        ram: RAM of the machines, see `describe_machine`.
        specs: the models; by default those of the catalog.
    """
    machines = {size: describe_machine(vram=size * GB, ram=ram) for size in SIZES_GB}
    models = sorted(specs or [entry.spec() for entry in CATALOG], key=lambda spec: spec.parameters)
    on_gpu = replace(goal, device="auto")
    return [_cell(plan_described(spec, machine, on_gpu), size) for spec in models for size, machine in machines.items()]


def _cell(found: DescribedPlan, size: int) -> Cell:
    plan, spec = found.plan, found.plan.spec
    gpu, ram, disk = (found.placement.blocks.count(place) for place in ("gpu", "ram", "disk"))
    peaks = plan.predicted
    return Cell(
        spec.name, spec.parameters, size, plan.precision, gpu, ram, disk, peaks["vram"], peaks["ram"], found.speed
    )


def by_model(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The rows of the table: the cells of each model."""
    return [[cell for cell in cells if cell.model == model] for model in dict.fromkeys(cell.model for cell in cells)]


def to_csv(cells: Sequence[Cell]) -> str:
    """A header and one line per cell."""
    out = io.StringIO()
    rows = [cell.as_dict() for cell in cells]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
