"""`python -m lowmem verify`: measure on this machine what lowmem promises of a set-up."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_json, add_options, options
from lowmem.cli.console import follow
from lowmem.cli.plan import add_goal, goal_from, plan_from
from lowmem.planning.cache import CACHE_TYPES
from lowmem.planning.plan import BACKENDS
from lowmem.runtime.session import Session
from lowmem.settings import settings
from lowmem.units import format_seconds
from lowmem.verify.claims import FAILED, Claim, VerifyOptions
from lowmem.verify.report import write_report
from lowmem.verify.run import verify


def add_command(commands: Any) -> None:
    """Add `verify` to the subparsers of the command line."""
    parser = commands.add_parser("verify", help="measure on this machine what lowmem promises of a model")
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--original", metavar="MODEL", default="", help="what a quantized checkpoint was made from")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the report; default: a new file below LOWMEM_HOME")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    parser.add_argument("--cache-type", choices=CACHE_TYPES, default="same", help="data type of the KV cache")
    add_goal(parser)
    add_options(parser, VerifyOptions)
    add_json(parser, "report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen, session = options(args, VerifyOptions), Session(capped=True)
    plan = plan_from(args, session, cache_type=args.cache_type, backend=args.backend, **goal_from(args))
    receipt = follow(verify(session, plan, chosen, original=args.original), None if args.json else _print)
    found = receipt.details
    default = settings().outputs / f"verify-{time.strftime('%Y%m%d-%H%M%S')}" / "report.json"
    path = write_report(found, args.out or default)
    if args.json:
        print(json.dumps(found))
    else:
        failed = sum(claim["verdict"] == FAILED for claim in found["claims"])
        verdict = f"{failed} of the claims do not hold" if failed else "Every claim that was measured holds"
        print(f"{verdict}; {receipt.model} in {receipt.precision}, {format_seconds(receipt.seconds)}. Report: {path}")
    return 0 if found["passed"] else 1


def _print(claim: Claim) -> None:
    print(f"{claim.verdict:<12}  {claim.key:<8}  {claim.sentence}", flush=True)
