"""The command line: `python -m lowmem plan | generate | quantize | compare | offload | export | longctx | serve`.

The engine's plain face for people, scripts and benchmarks. With `--json` the last line of
standard output is the receipt and nothing else goes there; progress goes to standard error,
and only when that is a terminal. Exit status: 0, 2 for wrong use, 3 for a `LowMemError`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem.cli.compare import add_command as add_compare
from lowmem.cli.export import add_command as add_export
from lowmem.cli.longctx import add_command as add_longctx
from lowmem.cli.offload import add_command as add_offload
from lowmem.cli.quantize import add_command as add_quantize
from lowmem.errors import BadInput, LowMemError
from lowmem.events import Chunk, Completion, Receipt, Step
from lowmem.fields import aliases, build
from lowmem.generate.options import GenerateOptions
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.limits import limits_from
from lowmem.planning.cache import KV_STORAGES
from lowmem.planning.goal import Goal
from lowmem.planning.plan import BACKENDS, PRECISIONS, Plan
from lowmem.planning.planner import DEFAULT_GOAL
from lowmem.planning.planner import plan as make_plan
from lowmem.runtime.session import Session
from lowmem.ui.flags import add_flags
from lowmem.units import format_bytes, format_seconds, parse_bytes

MAXIMUM_PROMPTS = 100_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit status."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args)
    except LowMemError as error:
        print(error.message, file=sys.stderr)
        if error.hint:
            print(error.hint, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowmem", description="Language models inside a memory budget.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _plan_command(commands.add_parser("plan", help="how a model would run here, without loading it"))
    _generate_command(commands.add_parser("generate", help="answer a prompt, or a file of prompts"))
    add_quantize(commands)
    add_compare(commands)
    add_offload(commands)
    add_export(commands)
    add_longctx(commands)
    _serve_command(commands.add_parser("serve", help="the web app"))
    return parser


def _plan_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", help="demo, a hub id, a folder or a .gguf file; the best for this machine when left out"
    )
    _goal_flags(parser)
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    parser.set_defaults(run=_run_plan)


def _generate_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="demo, a hub id, a folder or a .gguf file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="one prompt a line")
    parser.add_argument("--raw", action="store_true", help="complete the text, without the chat template")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts at once; the budget decides when left out")
    parser.add_argument("--force", action="store_true", help="go on although the prediction is over the budget")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    _goal_flags(parser, kv=False)
    _option_flags(parser, GenerateOptions)
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=_run_generate)


def _serve_command(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.set_defaults(run=_run_serve)


def _goal_flags(parser: argparse.ArgumentParser, kv: bool = True) -> None:
    parser.add_argument("--vram", metavar="SIZE", type=_size, help="GPU memory budget, e.g. 6G")
    parser.add_argument("--ram", metavar="SIZE", type=_size, help="RAM budget, e.g. 12G")
    parser.add_argument(
        "--context", type=int, default=DEFAULT_GOAL.context, metavar="N", help="tokens of prompt and answer to plan for"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once to plan for")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, mps")
    if kv:
        parser.add_argument("--kv", choices=KV_STORAGES, default="same", help="storage of the KV cache")


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _option_flags(parser: argparse.ArgumentParser, kind: type) -> None:
    """A flag for every field of an options dataclass, from the field's own metadata."""
    for field in dataclasses.fields(kind):
        flag, meta = "--" + field.name.replace("_", "-"), field.metadata
        help = meta["help"].replace("%", "%%")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        elif isinstance(field.default, tuple):
            parser.add_argument(flag, action="append", default=None, metavar="TEXT", help=help)
        else:
            parser.add_argument(
                flag, default=None, choices=meta["choices"] or None, metavar=None if meta["choices"] else "X", help=help
            )
    for old, name in aliases(kind).items():
        action = argparse.BooleanOptionalAction if isinstance(getattr(kind(), name), bool) else "store"
        parser.add_argument("--" + old.replace("_", "-"), action=action, default=None, help=argparse.SUPPRESS)


def _options(args: argparse.Namespace, kind: type) -> Any:
    names = [*(field.name for field in dataclasses.fields(kind)), *aliases(kind)]
    return build(kind, {name: getattr(args, name) for name in names if getattr(args, name) is not None})


def _make_plan(args: argparse.Namespace, session: Session, kv: str) -> Plan:
    from lowmem.models.choices import choices
    from lowmem.models.source import read_spec

    measure_runtime_bytes()
    hardware = session.hardware()
    limits = limits_from(hardware, args.ram, args.vram)
    backend = getattr(args, "backend", "auto")
    if backend == "auto" and getattr(args, "window", None):
        backend = "torch"  # a graph has no window, and none is written in vain
    goal = Goal(
        context=args.context,
        batch=args.batch,
        precision=args.precision,
        device=args.device,
        kv=kv,
        backend=backend,
    )
    if args.model:
        return make_plan(read_spec(args.model), hardware, limits, goal)
    return make_plan(None, hardware, limits, goal, choices())


def _run_plan(args: argparse.Namespace) -> int:
    session = Session()
    plan = _make_plan(args, session, args.kv)
    if args.json:
        print(json.dumps(_plan_as_dict(plan)))
        return 0
    print(plan.hardware.line())
    backend = " (ONNX Runtime)" if plan.backend == "onnx" else ""
    print(f"{plan.spec.name} in {plan.precision} on {plan.device}{backend}, {plan.context:,} tokens of context")
    print(plan.reason)
    for budget in plan.budgets:
        print(
            f"\n{budget.memory.upper()}  {format_bytes(budget.peak)} of {format_bytes(budget.limit)}  ({budget.verdict})"
        )
        for line in budget.lines:
            if line.count:
                print(f"  {format_bytes(line.count):>9}  {line.key:<12} {line.why}")
    if plan.declined:
        print("\nDeclined:")
        for declined in plan.declined:
            print(f"  {declined.choice}: {declined.reason}")
    return 0


def _plan_as_dict(plan: Plan) -> dict[str, Any]:
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
            for b in plan.budgets
        },
        "declined": [dataclasses.asdict(declined) for declined in plan.declined],
    }


def _run_generate(args: argparse.Namespace) -> int:
    options = _options(args, GenerateOptions)
    prompts = _read_prompts(args.prompts) if args.prompts else None
    session = Session()
    plan = _make_plan(args, session, options.cache_type)
    _drain(session.load(plan, force=args.force), args.json)
    if prompts is None:
        events: Iterator[Any] = session.generate(args.prompt, options, raw=args.raw, force=args.force)
    else:
        events = session.batch(prompts, options, raw=args.raw, batch_size=args.batch_size, force=args.force)
    receipt = _drain(events, args.json)
    if args.json:
        print(json.dumps(receipt.as_dict()))
    else:
        _print_receipt(receipt)
    return 0


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path} cannot be read as text: {error}.", "Give a UTF-8 file with one prompt a line."
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not 1 <= len(prompts) <= MAXIMUM_PROMPTS:
        raise BadInput(f"{path} holds {len(prompts):,} prompts.", f"Give 1 to {MAXIMUM_PROMPTS:,} lines.")
    return prompts


def _drain(events: Iterator[Any], quiet: bool) -> Receipt:
    """Show events as they come; the receipt is the last one."""
    terminal = sys.stderr.isatty()
    receipt: Receipt | None = None
    for event in events:
        if isinstance(event, Receipt):
            receipt = event
        elif isinstance(event, Step) and terminal:
            share = f"{event.done / event.total:4.0%} " if event.total else ""
            print(f"\r\x1b[K{share}{event.note}", end="", file=sys.stderr, flush=True)
        elif isinstance(event, Chunk) and not quiet:
            if terminal and event.new_tokens <= 1:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            print(event.text, end="", flush=True)
        elif isinstance(event, Completion) and not quiet:
            print(json.dumps(dataclasses.asdict(event), ensure_ascii=False), flush=True)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if receipt is None:
        raise RuntimeError("an action ended without a receipt")
    return receipt


def _print_receipt(receipt: Receipt) -> None:
    print(
        f"\n\n{receipt.model} in {receipt.precision}: {receipt.new_tokens:,} tokens in {format_seconds(receipt.seconds)}",
        file=sys.stderr,
    )
    if receipt.prefill_tps:
        speed = f"prefill {receipt.prefill_tps:.0f} and decode {receipt.decode_tps:.1f} tokens/s"
        print(f"first token after {format_seconds(receipt.seconds_to_first)}; {speed}", file=sys.stderr)
    for memory, predicted in receipt.predicted.items():
        measured = format_bytes(receipt.measured[memory]) if memory in receipt.measured else "?"
        print(f"{memory.upper()} peak: predicted {format_bytes(predicted)}, measured {measured}", file=sys.stderr)
    for note in receipt.notes:
        print(note, file=sys.stderr)


def _run_serve(args: argparse.Namespace) -> int:
    from lowmem.ui.launch import serve

    serve(**{name: value for name, value in vars(args).items() if name != "run"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
