"""`python -m lowmem quantize`: a smaller checkpoint of a model, within a memory budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lowmem import quant
from lowmem.cli.arguments import (
    MODEL_HELP,
    add_budget,
    add_json,
    add_option,
    add_options,
    budget,
    check_parent,
    explicit_options,
)
from lowmem.cli.console import finish, follow
from lowmem.fields import Option, describe
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.budget import UNLIMITED
from lowmem.machine.cap import cap_memory
from lowmem.machine.hardware import probe
from lowmem.quant.base import BITS
from lowmem.quant.calibration import Calibration
from lowmem.quant.request import EMBEDDING_BITS, QuantizeRequest
from lowmem.quant.run import quantize
from lowmem.units import format_bytes, format_seconds

_COMMON = ("bits", "group_size", "symmetric")
_CALIBRATION_FLAGS = {"text": "--calibration", "samples": "--samples", "length": "--sequence-length"}


def add_command(commands: Any) -> None:
    """Add `quantize` to the subparsers of the command line."""
    parser = commands.add_parser("quantize", help="make a smaller checkpoint of a model, block by block")
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("out", type=Path, help="a new folder; an unfinished one is resumed")
    parser.add_argument("--method", choices=quant.METHODS, default=quant.DEFAULT, help=f"default {quant.DEFAULT}")
    parser.add_argument("--bits", choices=[str(bits) for bits in BITS], help="bits per weight")
    parser.add_argument("--group-size", metavar="N", help="weights that share a scale; -1 is a whole row")
    parser.add_argument(
        "--embedding-bits",
        choices=[str(bits) for bits in EMBEDDING_BITS],
        default=EMBEDDING_BITS[0],
        help=f"bits of embedding and output head, default {EMBEDDING_BITS[0]}; 16 leaves them as other programs read them",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sym", dest="symmetric", action="store_true", default=None, help="no zero points")
    kind.add_argument("--asym", dest="symmetric", action="store_false", default=None, help="a zero point per group")
    add_options(parser, Calibration, _CALIBRATION_FLAGS)
    for option, methods in _method_options().values():
        if option.name not in _COMMON:
            add_option(parser, option, suffix=f" ({', '.join(methods)})")
    parser.add_argument(
        "--restart", action="store_true", help="delete an unfinished run with other settings, and start over"
    )
    add_budget(parser, vram=False)
    add_json(parser)
    parser.set_defaults(run=run)


def _method_options() -> dict[str, tuple[Option, list[str]]]:
    """Every option of a method, with the names of the methods that have it."""
    found: dict[str, tuple[Option, list[str]]] = {}
    for method in quant.all_methods():
        for option in describe(method.Options):
            found.setdefault(option.name, (option, []))[1].append(method.name)
    return found


def run(args: argparse.Namespace) -> int:
    check_parent(args.out)
    measure_runtime_bytes()
    hardware = probe()
    request = QuantizeRequest.validated(
        args.model,
        args.method,
        explicit_options(args, [option for option, _ in _method_options().values()]),
        explicit_options(args, describe(Calibration)),
        args.embedding_bits,
        hardware=hardware,
        out=args.out,
        budget=budget(args).bounded(hardware) if args.ram else UNLIMITED,
        restart=args.restart,
    )
    cap_memory(request.budget)
    receipt = follow(quantize(request))
    if not args.json:
        details = receipt.details
        row = {
            "bits": f"{details['bits_per_quantized_weight']:.2f}",
            "original": format_bytes(details["original_bytes"]),
            "quantized": format_bytes(receipt.disk_bytes),
            "relative loss": f"{details['loss']:.2e}",
            "bits of all": f"{details['bits_per_parameter']:.2f}",
        }
        for cells in (row.keys(), row.values()):
            print("  ".join(cell.rjust(13) for cell in cells))
    seconds = format_seconds(receipt.seconds)
    return finish(receipt, args.json, f"{receipt.model}: {receipt.precision}, in {seconds}; {args.out}")
