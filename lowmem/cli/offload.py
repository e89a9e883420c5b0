"""`python -m lowmem offload`: run a model that does not fit, streaming its blocks from RAM and disk."""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_force, add_json, budget
from lowmem.cli.console import finish, follow
from lowmem.cli.plan import OFFLOAD_CONTEXT, add_device
from lowmem.errors import BadInput
from lowmem.events import Chunk, Completion, Receipt, Step
from lowmem.generate.options import GenerateOptions
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.isolated import Finished, run_isolated
from lowmem.messages import msg
from lowmem.models.source import read_spec
from lowmem.offload.plans import parse_blocks
from lowmem.offload.run import BlockPlacement, batched, plan_for, run
from lowmem.planning.goal import Goal
from lowmem.planning.plan import Plan
from lowmem.runtime.session import Session
from lowmem.units import format_bytes, format_seconds


def add_command(commands: Any) -> None:
    """Add `offload` to the subparsers of the command line."""
    parser = commands.add_parser("offload", help="run a model that does not fit, from RAM and disk")
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--raw", action="store_true", help="complete the text, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--sample", action="store_true", help="sample tokens; default: greedy decoding")
    add_budget(parser)
    parser.add_argument(
        "--context", type=int, default=OFFLOAD_CONTEXT, metavar="N", help="tokens of prompt and answer together"
    )
    parser.add_argument("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="compute dtype")
    add_device(parser)
    parser.add_argument("--disk-blocks", metavar="LIST", help="blocks on disk: all, or numbers like 0-5,9")
    parser.add_argument("--ram-blocks", metavar="LIST", help="blocks in RAM, for a GPU: all, or numbers like 0-5,9")
    parser.add_argument(
        "--batch", default="1", metavar="N", help="sequences per pass over the weights; max: what the budget holds"
    )
    parser.add_argument("--measure", action="store_true", help="measure the speed of disk, RAM and bus again")
    parser.add_argument("--reference", choices=("accelerate",), help="run with accelerate's device_map instead")
    add_force(parser)
    add_json(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise BadInput(
            msg("{max_new_tokens} new tokens are not possible.", max_new_tokens=args.max_new_tokens),
            msg("Choose at least 1."),
        )
    measure_runtime_bytes()
    layers = read_spec(args.model).layers
    places = BlockPlacement(parse_blocks(args.ram_blocks, layers), parse_blocks(args.disk_blocks, layers))
    if args.reference:
        receipt = follow(_reference(args))
    else:
        session, largest = Session(capped=True), args.batch == "max"
        batch = 1 if largest else _batch(args.batch)
        goal = Goal(context=args.context, batch=batch, precision=args.precision, device=args.device)
        plan = plan_for(session, args.model, goal, budget(args), places, largest)
        if not args.json:
            print(f"{plan.reason} {plan.sentence()}", file=sys.stderr)
        answers = _Answers()
        receipt = follow(_events(session, plan, args), None if args.json else answers.show)
        answers.finish()
        session.unload()
    return finish(receipt, args.json, *_summary(receipt))


def _batch(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise BadInput(
            msg("A batch of {text!r} is not possible.", text=text), msg("Use a number of at least 1, or max.")
        )
    return int(text)


def _events(session: Session, plan: Plan, args: argparse.Namespace) -> Iterator[Any]:
    options = GenerateOptions(max_new_tokens=args.max_new_tokens, greedy=not args.sample)
    prompts, options = batched(args.prompt, options, plan.batch)
    return run(session, plan, prompts, options, raw=args.raw, again=args.measure, force=args.force)


class _Answers:
    """Prints the first answer as it arrives, then the others, each distinct text once."""

    def __init__(self) -> None:
        self._texts: defaultdict[int, str] = defaultdict(str)

    def show(self, event: Chunk | Completion) -> None:
        self._texts[event.index] += event.text
        if event.index == 0:
            print(event.text, end="", flush=True)

    def finish(self) -> None:
        for text, count in Counter(self._texts[index] for index in sorted(self._texts)).items():
            if text != self._texts[0]:
                print(f"\n\n{text}", end="", flush=True)
            if count > 1:
                print(f"\n\n{count:,} of {len(self._texts):,} answers are identical.", file=sys.stderr)


def _reference(args: argparse.Namespace) -> Iterator[Step | Receipt]:
    arguments = {
        "model": args.model, "method": args.reference, "prompt": args.prompt, "new_tokens": args.max_new_tokens,
        "budget": budget(args).as_dict(), "context": args.context,
    }  # fmt: skip
    for event in run_isolated("offload", arguments, budget=budget(args)):
        yield Receipt(**event.value) if isinstance(event, Finished) else event


def _summary(receipt: Receipt) -> tuple[str, ...]:
    details = receipt.details
    speed = f"{receipt.new_tokens:,} tokens, {details.get('seconds_per_token', 0.0):.2f} s per token"
    if predicted := details.get("predicted_seconds_per_token"):
        speed += f", predicted {format_seconds(predicted)} ({details['bound_by']})"
    return (
        f"\n\n{receipt.model} in {receipt.precision} on {receipt.device}: {details['placement']}",
        speed,
        f"read {format_bytes(details['bytes_read'])}",
    )
