"""`python -m lowmem export`: write a model as ONNX graphs or a TensorRT engine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_json, add_options, budget, options
from lowmem.cli.console import finish, follow
from lowmem.export.request import ExportRequest
from lowmem.export.run import export_model
from lowmem.machine.cap import cap_memory
from lowmem.planning.graph_options import ExportOptions
from lowmem.units import format_bytes, format_seconds


def add_command(commands: Any) -> None:
    """Add `export` to the subparsers of the command line."""
    parser = commands.add_parser("export", help="write a model as ONNX graphs or a TensorRT engine")
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("out", type=Path, help="a new folder")
    add_options(parser, ExportOptions)
    add_budget(parser, vram=False)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    request = ExportRequest(args.model, args.out, options(args, ExportOptions), budget(args))
    cap_memory(request.budget)
    receipt = follow(export_model(request))
    size, seconds = format_bytes(receipt.disk_bytes), format_seconds(receipt.seconds)
    return finish(receipt, args.json, f"{receipt.model} in {receipt.precision}: {size} in {seconds}")
