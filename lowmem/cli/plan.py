"""`python -m lowmem plan`: how a model would run here, without loading it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_json, budget
from lowmem.errors import LowMemError
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.offload.run import plan_for
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.planning.planner import DEFAULT_GOAL
from lowmem.precisions import PRECISIONS
from lowmem.runtime.session import Session
from lowmem.ui.names import name
from lowmem.units import format_bytes

OFFLOAD_CONTEXT = 512
"""The default context of an offloaded run."""


def add_command(commands: Any) -> None:
    """Add `plan` to the subparsers of the command line."""
    parser = commands.add_parser("plan", help="how a model would run here, without loading it")
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP}; default: the best model for this machine")
    add_goal(parser)
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
    plan = plan_from(args, Session(), cache_type=args.cache_type, **goal_from(args))
    if args.json:
        print(json.dumps(_as_dict(plan)))
        return 0
    print(plan.hardware.line())
    backend = " (ONNX Runtime)" if plan.backend == "onnx" else ""
    print(f"{plan.spec.name} in {plan.precision} on {plan.device}{backend}, {plan.context:,} tokens of context")
    print(plan.reason)
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
    if plan.verdict == "over" and (hint := _offload_hint(args, plan)):
        print(f"\n{hint}")
    return 0


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
        "predicted": plan.predicted,
        "budgets": {
            b.memory: {"limit": b.limit, **{key: b.share(key) for key in dict.fromkeys(line.key for line in b.lines)}}
            for b in plan.estimates
        },
        "declined": [dataclasses.asdict(declined) for declined in plan.declined],
    }
