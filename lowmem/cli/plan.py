"""`python -m lowmem plan`: how a model would run here, or on a described machine, without loading it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_json, budget, check_parent
from lowmem.errors import LowMemError
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.budget import MemoryBudget
from lowmem.machine.described import describe_machine
from lowmem.machine.hardware import Hardware, probe
from lowmem.measure.rows import write_atomically
from lowmem.models.source import read_spec
from lowmem.offload.run import plan_for
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.described import DescribedPlan, as_dict, plan_described
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.planning.planner import DEFAULT_GOAL
from lowmem.planning.what_runs import SIZES_GB, Cell, by_model, to_csv, what_runs
from lowmem.plots.figure import encode
from lowmem.plots.what_runs import picture
from lowmem.precisions import PRECISIONS
from lowmem.runtime.session import Session
from lowmem.ui.names import name
from lowmem.units import format_bytes

OFFLOAD_CONTEXT = 512
"""The default context of an offloaded run."""


def add_command(commands: Any) -> None:
    """Add `plan` to the subparsers of the command line."""
    parser = commands.add_parser("plan", help="how a model would run here or on another machine, without loading it")
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP}; default: the best model for the machine")
    add_goal(parser)
    other = parser.add_argument_group(
        "another machine",
        "With --gpu, or with a --vram that no GPU here has, the plan is for a machine with that GPU; --ram is its RAM.",
    )
    other.add_argument("--gpu", metavar="NAME", help="a card such as t4, 3060, 4060, rtx-a2000, h100")
    other.add_argument(
        "--table", action="store_true", help="the model, or all of the catalog, on 4 to 24 GB of GPU memory"
    )
    other.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    other.add_argument("--picture", type=Path, metavar="FILE", help="draw the table; a name ending in .svg gives SVG")
    parser.add_argument("--cache-type", choices=CACHE_TYPES, default="same", help="data type of the KV cache")
    add_json(parser, "plan")
    parser.set_defaults(run=run)


def add_goal(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a plan: budget, context, batch, precision and device."""
    add_budget(parser)
    parser.add_argument(
        "--context", type=int, default=DEFAULT_GOAL.context, metavar="N", help="tokens of prompt and answer together"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences that run at the same time")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or mps")


def plan_from(args: argparse.Namespace, session: Session, **goal: Any) -> Plan:
    """The plan for `args.model`, or for the best model that fits when it is None; `goal` are fields of `Goal`.

    Raises:
        LowMemError: see `Session.plan_for`.
    """
    measure_runtime_bytes()
    return session.plan_for(args.model or None, Goal(**goal), budget(args))


def goal_from(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Goal` that `add_goal` adds flags for."""
    return {name: getattr(args, name) for name in ("context", "batch", "precision", "device")}


def run(args: argparse.Namespace) -> int:
    goal = {"cache_type": args.cache_type, **goal_from(args)}
    if args.table or args.csv or args.picture:
        return _table(args, Goal(**goal))
    if machine := _described(args):
        limits = MemoryBudget.parse(vram=args.vram if args.gpu else None)
        spec = read_spec(args.model) if args.model else None
        found = plan_described(spec, machine, Goal(**goal), limits)
        _print(found.plan, args.json, as_dict(found))
        if not args.json:
            _print_described(found)
        return 0
    plan = plan_from(args, Session(), **goal)
    _print(plan, args.json)
    if not args.json and plan.verdict == "over" and (hint := _offload_hint(args, plan)):
        print(f"\n{hint}")
    return 0


def _described(args: argparse.Namespace) -> Hardware | None:
    """The machine that the flags describe, None if they speak of this one."""
    if args.gpu:
        return describe_machine(args.gpu, ram=args.ram)
    here = probe().gpus if args.vram else ()
    if not args.vram or any(args.vram <= gpu.total_bytes for gpu in here):
        return None
    return describe_machine(vram=args.vram, ram=args.ram)


def _print_described(found: DescribedPlan) -> None:
    blocks = found.placement.sentence()
    print(f"\nblocks   {blocks}")
    if found.speed:
        print(f"speed    {found.speed.text()}")
    print(f"install  {found.install}    (in lowmem's folder)")
    print(f"\n{found.not_here}")


def _table(args: argparse.Namespace, goal: Goal) -> int:
    check_parent(args.csv)
    check_parent(args.picture)
    cells = what_runs(args.ram, goal, [read_spec(args.model)] if args.model else None)
    if args.csv:
        write_atomically(args.csv, to_csv(cells))
    if args.picture:
        write_atomically(args.picture, encode(picture(cells), args.picture))
    if args.json:
        print(json.dumps([cell.as_dict() for cell in cells]))
    else:
        _print_table(cells)
    return 0


def _print_table(cells: Sequence[Cell]) -> None:
    sizes = (f"{size} GB" for size in SIZES_GB)
    print(f"{'tokens/s':<28}" + "".join(f"{size:<24}" for size in sizes).rstrip())
    for row in by_model(cells):
        print(f"{row[0].model:<28}" + "".join(f"{cell.text():<24}" for cell in row).rstrip())


def _print(plan: Plan, as_json: bool, more: Mapping[str, object] | None = None) -> None:
    """The plan for a person, or as JSON with `more` in it."""
    if as_json:
        print(json.dumps(_as_dict(plan) | {"runs_here": True} | dict(more or {})))
        return
    print(plan.hardware.line())
    backend = " (ONNX Runtime)" if plan.backend == "onnx" else ""
    print(f"{plan.spec.name} in {plan.precision} on {plan.device}{backend}, {plan.context:,} tokens of context")
    print(plan.reason)
    if plan.spec.source.caution:
        print(plan.spec.source.caution)
    for estimate in plan.estimates:
        peak, limit = format_bytes(estimate.peak), format_bytes(estimate.limit)
        print(f"\n{estimate.memory.upper()}  {peak} of {limit}  ({estimate.verdict})")
        for line in estimate.lines:
            if line.count:
                print(f"  {format_bytes(line.count):>9}  {name('shares', line.key):<12} {line.why}")
    if plan.declined:
        print("\nAlternatives considered:")
        for declined in plan.declined:
            print(f"  {declined.choice}: {declined.reason}")


def _offload_hint(args: argparse.Namespace, plan: Plan) -> str:
    """How to run a model that does not fit whole, "" if not even offloading helps."""
    context = min(args.context, OFFLOAD_CONTEXT)
    try:
        goal = Goal(context=context, batch=args.batch, precision=args.precision, device=args.device)
        offloaded = plan_for(Session(), plan.spec, goal, budget(args))
    except LowMemError:
        return ""
    if offloaded.verdict == "over":
        return ""
    peak = format_bytes(offloaded.main.peak)
    return (
        f"With offloading and {context:,} tokens of context it runs in {peak}, but slower: see lowmem offload --help."
    )


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "model": plan.spec.ref,
        "precision": plan.precision,
        "device": plan.device,
        "backend": plan.backend,
        "context": plan.context,
        "batch": plan.batch,
        "verdict": plan.verdict,
        "reason": plan.reason,
        "caution": plan.spec.source.caution,
        "predicted": plan.predicted,
        "budgets": {
            b.memory: {"limit": b.limit, **{key: b.share(key) for key in dict.fromkeys(line.key for line in b.lines)}}
            for b in plan.estimates
        },
        "declined": [dataclasses.asdict(declined) for declined in plan.declined],
    }
