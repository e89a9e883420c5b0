"""`python -m lowmem export`: a model as graphs, from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import Receipt, Step
from lowmem.export.run import export
from lowmem.fields import build
from lowmem.planning.graph_options import PRECISIONS, ExportOptions
from lowmem.units import format_bytes, format_seconds, parse_bytes


def add_command(commands: Any) -> None:
    """Add `export` to the subparsers of the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export", help="write a model as ONNX graphs or a TensorRT engine"
    )
    parser.add_argument("model", help="demo, a hub id, a folder or a .gguf file")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--format", choices=("onnx", "tensorrt"), default="onnx")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8")
    parser.add_argument("--group-size", type=int, metavar="N", help="int4: weights that share a scale")
    parser.add_argument("--fast-prefill", choices=("auto", "on", "off"), help="a second graph for prompts")
    parser.add_argument("--fused", action=argparse.BooleanOptionalAction, help="--no-fused: standard operators only")
    parser.add_argument("--optimise", action=argparse.BooleanOptionalAction, help="fuse the nodes of a generic graph")
    parser.add_argument("--ram", metavar="SIZE", type=_size, help="the most RAM to use, e.g. 3G")
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=_run)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(args: argparse.Namespace) -> int:
    names = [field.name for field in fields(ExportOptions)]
    options = build(ExportOptions, {name: getattr(args, name) for name in names if getattr(args, name) is not None})
    receipt = _drain(export(args.model, args.out, options, args.ram))
    if args.json:
        print(json.dumps(receipt.as_dict()))
        return 0
    print(
        f"{receipt.model} in {receipt.precision}: {format_bytes(receipt.disk_bytes)} in {format_seconds(receipt.seconds)}"
    )
    for memory, predicted in receipt.predicted.items():
        print(
            f"{memory.upper()} peak: predicted {format_bytes(predicted)}, measured {format_bytes(receipt.measured[memory])}"
        )
    for note in receipt.notes:
        print(note)
    return 0


def _drain(events: Iterator[Step | Receipt]) -> Receipt:
    terminal, receipt = sys.stderr.isatty(), None
    for event in events:
        if isinstance(event, Receipt):
            receipt = event
        elif terminal:
            share = f"{event.done / event.total:4.0%} " if event.total else ""
            print(f"\r\x1b[K{share}{event.note}", end="", file=sys.stderr, flush=True)
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if receipt is None:
        raise RuntimeError("an action ended without a receipt")
    return receipt
