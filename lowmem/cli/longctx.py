"""`python -m lowmem longctx stream | perplexity | hidden | recall | compare`: long texts on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_force, add_json, budget, report_rename
from lowmem.cli.console import finish, follow
from lowmem.cli.plan import add_device
from lowmem.datasets.long_text import long_text
from lowmem.datasets.texts import CHARACTERS_PER_TOKEN, MANUAL, NAMES, Text, evaluation_text
from lowmem.errors import BadInput
from lowmem.events import Chunk, Receipt
from lowmem.fields import build, describe
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.longctx.curve import Span
from lowmem.longctx.options import StrategyOptions, parse_layers
from lowmem.longctx.strategies import Point, compare_strategies
from lowmem.measure.rows import write_atomically
from lowmem.messages import msg
from lowmem.planning.goal import Goal
from lowmem.plots.figure import encode
from lowmem.plots.longctx import picture, to_csv
from lowmem.precisions import PRECISIONS
from lowmem.runtime.session import Session
from lowmem.units import format_bytes, format_seconds

KV_BITS = ("16", "8", "4", "2")
DEFAULT_WINDOW = 1024
DEFAULT_SINKS = 4


def add_command(commands: Any) -> None:
    """Add `longctx` to the subparsers of the command line."""
    parser = commands.add_parser("longctx", help="texts longer than memory or the model's context")
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    stream = _add_action(actions, "stream", _stream, "generate until stopped, with bounded memory")
    stream.add_argument("--max-new-tokens", default=256, metavar="N", help="tokens to generate, up to 1,000,000")
    stream.add_argument("--temperature", metavar="X", help="above 0; greedy by default")
    stream.add_argument("--seed", default=-1, metavar="N")
    perplexity = _add_action(actions, "perplexity", _perplexity, "perplexity of a text, segment by segment")
    perplexity.add_argument(
        "--stride", type=int, metavar="S", help="tokens between sliding windows; default: half the window"
    )
    hidden = _add_action(actions, "hidden", _hidden, "hidden states of a text, as a .npy or .safetensors file")
    hidden.add_argument("--stride", type=int, metavar="S", help="default: half the window")
    hidden.add_argument("--layers", default="-1", metavar="LIST", help="0 the embeddings, i after block i, -1 the last")
    _add_action(actions, "recall", _recall, "what the model recalls from within the window, and from before it")
    compare = _add_action(
        actions, "compare", _compare, "cache strategies side by side: full, window, recomputed, quantized", "exercise"
    )
    points = StrategyOptions().points
    compare.add_argument("--points", type=int, default=points, metavar="N", help="number of measurements")
    compare.add_argument("--png", type=Path, metavar="FILE", help="plot the result; a name ending in .svg gives SVG")


def _add_action(
    actions: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, old: str = ""
) -> argparse.ArgumentParser:
    """Add an action; `old` is its name in the last release."""
    parser: argparse.ArgumentParser = actions.add_parser(name, help=help, aliases=[old] if old else [])
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument(
        "--text", default=MANUAL, metavar="FILE", help=f"a text file, a URL (https://...), {' or '.join(NAMES)}"
    )
    parser.add_argument("--window", type=int, metavar="W", help=f"tokens in the cache; default {DEFAULT_WINDOW:,}")
    parser.add_argument(
        "--sinks", type=int, metavar="K", help=f"first tokens that stay in the cache; default {DEFAULT_SINKS}"
    )
    parser.add_argument("--kv-bits", choices=KV_BITS, help="bits per key and value; default: the compute dtype")
    parser.add_argument("--tokens", type=int, metavar="N", help="use only this many tokens of the text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    add_device(parser)
    add_budget(parser)
    add_force(parser)
    add_json(parser)

    def start(args: argparse.Namespace) -> int:
        if args.action == old:
            report_rename(old, name)
        return run(args)

    parser.set_defaults(run=start)
    return parser


def _stream(args: argparse.Namespace) -> int:
    sampling = {"greedy": True} if args.temperature is None else {"temperature": args.temperature}
    options = _cache_options(args, max_new_tokens=args.max_new_tokens, seed=args.seed, unbounded=True, **sampling)
    session = _load(args)
    return _finish(args, session.generate(_text(args), options, raw=True, force=args.force))


def _perplexity(args: argparse.Namespace) -> int:
    session, settings = _load(args), {"tokens": args.tokens, "force": args.force}
    if args.stride is not None or (args.sinks is None and args.kv_bits is None):
        return _finish(args, actions.sliding_perplexity(session, _text(args), *_window(args), **settings))
    return _finish(args, actions.streaming_perplexity(session, _text(args), _cache_options(args), **settings))


def _hidden(args: argparse.Namespace) -> int:
    if args.out is None:
        raise BadInput(msg("No file to write to."), msg("Name one with --out, ending in .npy or .safetensors."))
    layers = parse_layers(args.layers)
    settings = {"layers": layers, "tokens": args.tokens, "force": args.force}
    return _finish(args, actions.hidden_states(_load(args), _text(args), *_window(args), args.out, **settings))


def _recall(args: argparse.Namespace) -> int:
    return _finish(args, actions.recall(_load(args), _source(args).text, _cache_options(args)))


def _compare(args: argparse.Namespace) -> int:
    chosen = {option.name: getattr(args, option.name) for option in describe(StrategyOptions)}
    options = build(StrategyOptions, {name: value for name, value in chosen.items() if value is not None})
    points: list[Point] = []

    def show(point: Point) -> None:
        points.append(point)
        if args.out:
            write_atomically(args.out, to_csv(points))
        if not args.json:
            print(point.line(), flush=True)

    events = compare_strategies(args.model, _source(args), options, precision=args.precision, budget=budget(args))
    receipt = follow(events, show)
    if args.png:
        write_atomically(args.png, encode(picture(points, receipt.model), args.png))
    return finish(receipt, args.json, *_summary(receipt))


def _window(args: argparse.Namespace) -> tuple[int, int]:
    """Window and stride of a sliding window."""
    window = args.window or DEFAULT_WINDOW
    return window, max(1, window // 2) if args.stride is None else args.stride


def _cache_options(args: argparse.Namespace, **others: Any) -> GenerateOptions:
    values = {
        "window": DEFAULT_WINDOW if args.window is None else args.window,
        "sinks": DEFAULT_SINKS if args.sinks is None else args.sinks,
        "cache_type": "same" if args.kv_bits in (None, "16") else f"int{args.kv_bits}",
    }
    return build(GenerateOptions, {**values, **others})


def _text(args: argparse.Namespace) -> str:
    text = _source(args).text
    return text if args.tokens is None else text[: CHARACTERS_PER_TOKEN * args.tokens]


def _source(args: argparse.Namespace) -> Text:
    """Unlike the page, the command line sets no limit to the size of a file."""
    return long_text(source=args.text) if "://" in args.text else evaluation_text(args.text)


def _load(args: argparse.Namespace) -> Session:
    session = Session(capped=True)
    goal = Goal(precision=args.precision, device=args.device, backend="torch")
    follow(session.load(session.plan_for(args.model, goal, budget(args)), force=args.force))
    return session


def _finish(args: argparse.Namespace, events: Any) -> int:
    receipt = follow(events, None if args.json else _print)
    if args.out and receipt.action == "perplexity":
        write_atomically(args.out, _spans_csv(receipt))
    return finish(receipt, args.json, *_summary(receipt))


def _print(event: Chunk | Span) -> None:
    if isinstance(event, Chunk):
        print(event.text, end="", flush=True)
    elif isinstance(event, Span):
        print(f"{event.start:>9,} to {event.end:>9,}  perplexity {event.perplexity:,.2f}", flush=True)


def _spans_csv(receipt: Receipt) -> str:
    lines = [f"{span['start']},{span['end']},{span['perplexity']}" for span in receipt.details["spans"]]
    return "\n".join(["start,end,perplexity", *lines]) + "\n"


def _summary(receipt: Receipt) -> list[str]:
    details = receipt.details
    lines = [f"\n{receipt.model} in {receipt.precision}: {format_seconds(receipt.seconds)}"]
    if "perplexity" in details:
        lines.append(f"perplexity {details['perplexity']:.3f} over {details['tokens']:,} tokens")
    if receipt.disk_bytes and receipt.action == "hidden":
        lines.append(f"{details['file']}: {format_bytes(receipt.disk_bytes)}, {details['shape']}")
    return lines
