"""`python -m lowmem longctx stream | perplexity | hidden | recall | exercise`: long texts on the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.datasets.long_text import long_text
from lowmem.datasets.texts import CHARACTERS_PER_TOKEN, MANUAL, NAMES, Text, tail
from lowmem.errors import BadInput
from lowmem.events import Chunk, Receipt, Step
from lowmem.fields import build
from lowmem.generate.options import GenerateOptions
from lowmem.longctx import actions
from lowmem.longctx.curve import Span
from lowmem.longctx.exercise import Point, exercise
from lowmem.longctx.options import ExerciseOptions
from lowmem.machine.limits import limits_from
from lowmem.measure.rows import write_atomically
from lowmem.planning.goal import Goal
from lowmem.planning.plan import PRECISIONS
from lowmem.planning.planner import plan as make_plan
from lowmem.plots.drawing import to_png, to_svg
from lowmem.plots.longctx import picture, to_csv
from lowmem.runtime.session import Session
from lowmem.units import format_bytes, format_seconds, parse_bytes

KV_BITS = ("16", "8", "4", "2")
DEFAULT_WINDOW = 1024
DEFAULT_SINKS = 4


def add_command(commands: Any) -> None:
    """Add `longctx` to the command line's subparsers."""
    parser = commands.add_parser("longctx", help="texts longer than memory or the model's context")
    kinds = parser.add_subparsers(required=True, metavar="ACTION")
    stream = _action(kinds, "stream", _stream, "continue a text without end")
    stream.add_argument("--max-new-tokens", default=256, metavar="N", help="tokens to write, up to 1,000,000")
    stream.add_argument("--temperature", metavar="X", help="above 0; greedy when left out")
    stream.add_argument("--seed", default=-1, metavar="N")
    perplexity = _action(kinds, "perplexity", _perplexity, "how surprised a model is by a text, stretch by stretch")
    perplexity.add_argument(
        "--stride", type=int, metavar="S", help="windows over the text, so far apart; half the window"
    )
    hidden = _action(kinds, "hidden", _hidden, "hidden states of a text into a .npy or .safetensors file")
    hidden.add_argument("--stride", type=int, metavar="S", help="half the window when left out")
    hidden.add_argument("--layers", default="-1", metavar="LIST", help="0 the embeddings, i after block i, -1 the last")
    _action(kinds, "recall", _recall, "what is remembered within the window, and beyond")
    _exercise_flags(_action(kinds, "exercise", _exercise, "full, windows, recomputation, quantized: side by side"))


def _action(kinds: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=help)
    parser.add_argument("model", help="demo, a hub id, a folder or a .gguf file")
    parser.add_argument(
        "--text", default=MANUAL, metavar="FILE", help=f"a text file, an address (https://...), {' or '.join(NAMES)}"
    )
    parser.add_argument(
        "--window", type=int, metavar="W", help=f"tokens that are remembered; default {DEFAULT_WINDOW:,}"
    )
    parser.add_argument(
        "--sinks", type=int, metavar="K", help=f"first tokens kept beside the window; default {DEFAULT_SINKS}"
    )
    parser.add_argument("--kv-bits", choices=KV_BITS, help="bits of keys and values; as computed when left out")
    parser.add_argument("--tokens", type=int, metavar="N", help="read no more of the text than this")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, mps")
    parser.add_argument("--vram", metavar="SIZE", help="GPU memory budget, e.g. 6G")
    parser.add_argument("--ram", metavar="SIZE", help="RAM budget, e.g. 4G")
    parser.add_argument("--force", action="store_true", help="go on although the prediction is over the budget")
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=run)
    return parser


def _exercise_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--points", type=int, default=ExerciseOptions().points, metavar="N", help="places to measure at"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it; a name ending in .svg gives SVG")


def _stream(args: argparse.Namespace) -> int:
    options = _cache_options(args, max_new_tokens=args.max_new_tokens, seed=args.seed)
    given = {"greedy": True} if args.temperature is None else {"temperature": args.temperature}
    options = build(GenerateOptions, {**_as_dict(options), **given, "unbounded": True})
    session = _loaded(args)
    return _finish(args, session.generate(_text(args), options, raw=True, force=args.force))


def _perplexity(args: argparse.Namespace) -> int:
    window = args.window or DEFAULT_WINDOW
    session = _loaded(args)
    if args.stride is not None or (args.sinks is None and args.kv_bits is None):
        stride = max(1, window // 2) if args.stride is None else args.stride
        return _finish(
            args, actions.sliding_perplexity(session, _text(args), window, stride, tokens=args.tokens, force=args.force)
        )
    return _finish(
        args,
        actions.reading_perplexity(session, _text(args), _cache_options(args), tokens=args.tokens, force=args.force),
    )


def _hidden(args: argparse.Namespace) -> int:
    if args.out is None:
        raise BadInput("There is no file to write to.", "Name one with --out, ending in .npy or .safetensors.")
    window = args.window or DEFAULT_WINDOW
    stride = max(1, window // 2) if args.stride is None else args.stride
    try:
        layers = [int(layer) for layer in args.layers.split(",")]
    except ValueError:
        raise BadInput(f"{args.layers!r} is not a list of layers.", "Write it like 0,6,-1.") from None
    session = _loaded(args)
    return _finish(
        args,
        actions.hidden_states(
            session, _text(args), window, stride, args.out, layers=layers, tokens=args.tokens, force=args.force
        ),
    )


def _recall(args: argparse.Namespace) -> int:
    return _finish(args, actions.recall(_loaded(args), _source(args).text, _cache_options(args)))


def _exercise(args: argparse.Namespace) -> int:
    options = build(
        ExerciseOptions,
        {
            "tokens": args.tokens or ExerciseOptions().tokens,
            "window": args.window or ExerciseOptions().window,
            "sinks": DEFAULT_SINKS if args.sinks is None else args.sinks,
            "kv_bits": args.kv_bits or "4",
            "points": args.points,
        },
    )
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    points: list[Point] = []
    events = exercise(args.model, _source(args), options, precision=args.precision, ram=ram, vram=vram)
    for event in _shown(events, args.json):
        if isinstance(event, Point):
            points.append(event)
            if args.out:
                write_atomically(args.out, to_csv(points))
        elif isinstance(event, Receipt):
            if args.png:
                sheet = picture(points, event.model)
                write_atomically(args.png, to_svg(sheet) if args.png.suffix.lower() == ".svg" else to_png(sheet))
            _show_receipt(event, args.json)
    return 0


def _cache_options(args: argparse.Namespace, **others: Any) -> GenerateOptions:
    values = {
        "window": DEFAULT_WINDOW if args.window is None else args.window,
        "sinks": DEFAULT_SINKS if args.sinks is None else args.sinks,
        "cache_type": "same" if args.kv_bits in (None, "16") else f"int{args.kv_bits}",
    }
    return build(GenerateOptions, {**values, **others})


def _as_dict(options: GenerateOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__slots__}


def _text(args: argparse.Namespace) -> str:
    text = _source(args).text
    return text if args.tokens is None else text[: CHARACTERS_PER_TOKEN * args.tokens]


def _source(args: argparse.Namespace) -> Text:
    """Files may be larger here than what a page accepts; addresses have the same bounds."""
    return long_text(source=args.text) if "://" in args.text else tail(args.text)


def _loaded(args: argparse.Namespace) -> Session:
    from lowmem.models.source import read_spec

    session = Session()
    hardware = session.hardware()
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    goal = Goal(precision=args.precision, device=args.device, backend="torch")
    plan = make_plan(read_spec(args.model), hardware, limits_from(hardware, ram, vram), goal)
    for _ in _shown(session.load(plan, force=args.force), quiet=True):
        pass
    return session


def _finish(args: argparse.Namespace, events: Iterator[Any]) -> int:
    for event in _shown(events, args.json):
        if isinstance(event, Receipt):
            if args.out and event.action == "perplexity":
                write_atomically(args.out, _spans_csv(event))
            _show_receipt(event, args.json)
    return 0


def _spans_csv(receipt: Receipt) -> str:
    lines = [f"{span['start']},{span['end']},{span['perplexity']}" for span in receipt.details["spans"]]
    return "\n".join(["start,end,perplexity", *lines]) + "\n"


def _shown(events: Iterator[Any], quiet: bool) -> Iterator[Any]:
    """Pass events on, and show them as they come."""
    terminal = sys.stderr.isatty()
    for event in events:
        if terminal and not (isinstance(event, Chunk) and event.new_tokens > 1):
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if isinstance(event, Step) and terminal:
            share = f"{event.done / event.total:4.0%} " if event.total else ""
            print(f"{share}{event.note}", end="", file=sys.stderr, flush=True)
        elif isinstance(event, Chunk) and not quiet:
            print(event.text, end="", flush=True)
        elif isinstance(event, Span) and not quiet:
            print(f"{event.start:>9,} to {event.end:>9,}  perplexity {event.perplexity:,.2f}", flush=True)
        elif isinstance(event, Point) and not quiet:
            print(event.line(), flush=True)
        yield event


def _show_receipt(receipt: Receipt, quiet: bool) -> None:
    if quiet:
        print(json.dumps(receipt.as_dict()))
        return
    print(f"\n{receipt.model} in {receipt.precision}: {format_seconds(receipt.seconds)}", file=sys.stderr)
    if "perplexity" in receipt.details:
        print(
            f"perplexity {receipt.details['perplexity']:.3f} over {receipt.details['tokens']:,} tokens", file=sys.stderr
        )
    if receipt.disk_bytes and receipt.action == "hidden":
        print(
            f"{receipt.details['file']}: {format_bytes(receipt.disk_bytes)}, {receipt.details['shape']}",
            file=sys.stderr,
        )
    for memory, predicted in receipt.predicted.items():
        measured = format_bytes(receipt.measured[memory]) if memory in receipt.measured else "?"
        print(f"{memory.upper()} peak: predicted {format_bytes(predicted)}, measured {measured}", file=sys.stderr)
    for note in receipt.notes:
        print(note, file=sys.stderr)
