"""`python -m lowmem offload`: a prompt through a model that does not fit."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import Chunk, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.models.source import read_spec
from lowmem.offload.planned import blocks
from lowmem.offload.run import Where, plan_for, run, together
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session
from lowmem.units import format_bytes, format_seconds, parse_bytes


def add_command(commands: Any) -> None:
    """Add `offload` to the command line's subparsers."""
    parser = commands.add_parser("offload", help="run a model that does not fit, from RAM and disk")
    parser.add_argument("model", help="demo, a hub id, a folder or a .gguf file")
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--raw", action="store_true", help="complete the text, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--sample", action="store_true", help="draw tokens; without it the most likely one is taken")
    parser.add_argument("--ram", metavar="SIZE", help="RAM budget, e.g. 2G")
    parser.add_argument("--vram", metavar="SIZE", help="GPU memory budget, e.g. 4G")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens of prompt and answer to plan for")
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="to compute in")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0")
    parser.add_argument("--disk-blocks", metavar="LIST", help="blocks on disk: all, or numbers like 0-5,9")
    parser.add_argument("--ram-blocks", metavar="LIST", help="blocks in RAM, for a GPU: all, or numbers like 0-5,9")
    parser.add_argument(
        "--batch", default="1", metavar="N", help="answers at once; max lets the budget decide: one pass serves all"
    )
    parser.add_argument("--measure", action="store_true", help="measure this machine's disk, RAM and bus again")
    parser.add_argument("--reference", choices=("accelerate",), help="run by accelerate's device_map instead")
    parser.add_argument("--force", action="store_true", help="go on although the prediction is over the budget")
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise BadInput(f"{args.max_new_tokens} new tokens are not possible.", "Ask for at least 1.")
    measure_runtime_bytes()
    layers = read_spec(args.model).layers
    places = Where(blocks(args.ram_blocks, layers), blocks(args.disk_blocks, layers))
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    if args.reference:
        receipt = _reference(args, ram, vram)
    else:
        session = Session()
        most = args.batch == "max"
        goal = Goal(
            context=args.context, batch=1 if most else _count(args.batch), precision=args.precision, device=args.device
        )
        plan = plan_for(session, args.model, goal, ram, vram, places, most)
        receipt = _run(session, plan, args)
    print(json.dumps(receipt.as_dict())) if args.json else _print(receipt)
    return 0


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise BadInput(f"{text!r} answers at once are not possible.", "Write a number from 1 on, or max.")
    return int(text)


def _run(session: Session, plan: Plan, args: argparse.Namespace) -> Receipt:
    if not args.json:
        print(f"{plan.reason} {plan.sentence()}", file=sys.stderr)
    options = GenerateOptions(max_new_tokens=args.max_new_tokens, greedy=not args.sample)
    receipt: Receipt | None = None
    events = run(
        session, plan, *together(args.prompt, options, plan.batch), raw=args.raw, again=args.measure, force=args.force
    )
    for event in events:
        if isinstance(event, Receipt):
            receipt = event
        elif isinstance(event, Step):
            _progress(event)
        elif not args.json:
            print(event.text, end="" if isinstance(event, Chunk) else "\n\n", flush=True)
    session.unload()
    assert receipt is not None  # every action ends in one
    return receipt


def _reference(args: argparse.Namespace, ram: int | None, vram: int | None) -> Receipt:
    arguments = {
        "model": args.model, "method": args.reference, "prompt": args.prompt, "new_tokens": args.max_new_tokens,
        "ram": ram, "vram": vram, "context": args.context,
    }  # fmt: skip
    for event in run_isolated("offload", arguments):
        if isinstance(event, Finished):
            return Receipt(**event.value)
        _progress(event)
    raise RuntimeError("a job ended without a result")


def _progress(step: Step) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{step.note}", end="\r", file=sys.stderr, flush=True)


def _print(receipt: Receipt) -> None:
    details = receipt.details
    print(f"\n\n{receipt.model} in {receipt.precision} on {receipt.device}: {details['placement']}", file=sys.stderr)
    predicted = details.get("predicted_seconds_per_token")
    bound = f", predicted {format_seconds(predicted)} ({details['bound_by']})" if predicted else ""
    print(
        f"{receipt.new_tokens:,} tokens, {details.get('seconds_per_token', 0.0):.2f} s a token{bound}", file=sys.stderr
    )
    for memory, measured in receipt.measured.items():
        expected = f", predicted {format_bytes(receipt.predicted[memory])}" if memory in receipt.predicted else ""
        print(f"{memory.upper()} peak: {format_bytes(measured)}{expected}", file=sys.stderr)
    print(f"read {format_bytes(details['bytes_read'])}", file=sys.stderr)
    for note in receipt.notes:
        print(note, file=sys.stderr)
