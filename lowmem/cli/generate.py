"""`python -m lowmem generate`: answer a prompt, or a file of prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_force, add_json, add_options, options
from lowmem.cli.console import finish, follow
from lowmem.cli.plan import add_goal, goal_from, plan_from
from lowmem.errors import BadInput
from lowmem.events import Chunk, Completion
from lowmem.generate.options import GenerateOptions
from lowmem.messages import msg
from lowmem.planning.plan import BACKENDS
from lowmem.runtime.session import Session
from lowmem.units import format_seconds

MAXIMUM_PROMPTS = 100_000


def add_command(commands: Any) -> None:
    """Add `generate` to the subparsers of the command line."""
    parser = commands.add_parser("generate", help="answer a prompt, or a file of prompts")
    parser.add_argument("model", help=MODEL_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--prompts", metavar="FILE", type=Path, help="one prompt a line")
    parser.add_argument("--raw", action="store_true", help="complete the text, without the chat template")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts per batch; default: what the budget holds")
    add_force(parser)
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    add_goal(parser)
    add_options(parser, GenerateOptions)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    chosen = options(args, GenerateOptions)
    prompts = _read_prompts(args.prompts) if args.prompts else None
    session = Session(capped=True)
    backend = args.backend
    if backend == "auto" and chosen.window:
        backend = "torch"  # an exported graph has no sliding window, so none is exported
    follow(
        session.load(
            plan_from(args, session, cache_type=chosen.cache_type, backend=backend, **goal_from(args)), force=args.force
        )
    )
    if prompts is None:
        events: Iterator[Any] = session.generate(args.prompt, chosen, raw=args.raw, force=args.force)
    else:
        events = session.batch(prompts, chosen, raw=args.raw, batch_size=args.batch_size, force=args.force)
    receipt = follow(events, None if args.json else _print)
    summary = [
        f"\n\n{receipt.model} in {receipt.precision}: {receipt.new_tokens:,} tokens in {format_seconds(receipt.seconds)}"
    ]
    if receipt.prefill_tps:
        summary.append(
            f"first token after {format_seconds(receipt.seconds_to_first)}; "
            f"prefill {receipt.prefill_tps:.0f} and decode {receipt.decode_tps:.1f} tokens/s"
        )
    return finish(receipt, args.json, *summary)


def _print(event: Chunk | Completion) -> None:
    if isinstance(event, Chunk):
        print(event.text, end="", flush=True)
    else:
        print(json.dumps(dataclasses.asdict(event), ensure_ascii=False), flush=True)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            msg("{path} cannot be read as text: {error}.", path=path, error=error),
            msg("Use a UTF-8 file with one prompt per line."),
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not 1 <= len(prompts) <= MAXIMUM_PROMPTS:
        raise BadInput(
            msg("{path} holds {prompts:,} prompts.", path=path, prompts=len(prompts)),
            msg("Use a file of 1 to {maximum_prompts:,} lines.", maximum_prompts=MAXIMUM_PROMPTS),
        )
    return prompts
