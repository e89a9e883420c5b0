"""`python -m lowmem quantize`: a smaller checkpoint of a model, made inside a memory budget."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from lowmem.errors import BadInput
from lowmem.events import Receipt, Step
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.hardware import probe
from lowmem.machine.limits import limits_from
from lowmem.quant import METHODS, get
from lowmem.quant.base import BITS
from lowmem.quant.calibration import Calibration
from lowmem.quant.run import quantize
from lowmem.units import format_bytes, format_seconds, parse_bytes

_NAMED = ("bits", "group_size", "symmetric")
_CALIBRATION_FLAGS = {"text": "--calibration", "samples": "--samples", "length": "--sequence-length"}


def add_command(commands: Any) -> None:
    """Add `quantize` to the command line's subparsers."""
    parser = commands.add_parser("quantize", help="a smaller checkpoint of a model, made block by block")
    parser.add_argument("model", help="demo, a hub id, a folder or a .gguf file")
    parser.add_argument("out", type=Path, help="the folder to make; an unfinished one is continued")
    parser.add_argument("--method", choices=METHODS, default="gptq", help="default gptq")
    parser.add_argument("--bits", choices=[str(bits) for bits in BITS], help="width of a stored weight")
    parser.add_argument("--group-size", metavar="N", help="weights that share a scale; -1 is a whole row")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sym", dest="symmetric", action="store_true", default=None, help="no zero points")
    kind.add_argument("--asym", dest="symmetric", action="store_false", default=None, help="a zero point a group")
    for field in dataclasses.fields(Calibration):
        flag, meta = _CALIBRATION_FLAGS[field.name], field.metadata
        parser.add_argument(
            flag, dest=field.name, default=field.default, metavar="X", help=f"{meta['help']} Default {field.default}."
        )
    for name, (field, methods) in _method_fields().items():
        _add_option(parser, name, field, methods)
    parser.add_argument("--ram", metavar="SIZE", help="RAM budget, e.g. 3G")
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=run)


def _method_fields() -> dict[str, tuple[dataclasses.Field[Any], list[str]]]:
    """Every option that only some methods have, with their names."""
    found: dict[str, tuple[dataclasses.Field[Any], list[str]]] = {}
    for method in METHODS:
        for field in dataclasses.fields(get(method).Options):
            if field.name not in _NAMED:
                found.setdefault(field.name, (field, []))[1].append(method)
    return found


def _add_option(parser: argparse.ArgumentParser, name: str, field: dataclasses.Field[Any], methods: list[str]) -> None:
    flag, meta = "--" + name.replace("_", "-"), field.metadata
    told = f"{meta['help']} ({', '.join(methods)})".replace("%", "%%")
    if isinstance(field.default, bool):
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=told)
    else:
        choices = meta["choices"] or None
        parser.add_argument(flag, dest=name, default=None, choices=choices, metavar=None if choices else "X", help=told)


def run(args: argparse.Namespace) -> int:
    names = [*_NAMED, *_method_fields()]
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    calibration = {name: getattr(args, name) for name in _CALIBRATION_FLAGS}
    if not args.out.absolute().parent.is_dir():
        raise BadInput(f"There is no folder {args.out.absolute().parent}.", "Name a new folder in one that exists.")
    measure_runtime_bytes()
    ram = None if args.ram is None else limits_from(probe(), parse_bytes(args.ram)).ram
    for event in quantize(args.model, args.out, args.method, options, calibration, ram):
        if isinstance(event, Step):
            _show_step(event)
        else:
            _show_receipt(event, args.out, args.json)
    return 0


def _show_step(step: Step) -> None:
    if sys.stderr.isatty():
        share = f"{step.done / step.total:4.0%} " if step.total else ""
        print(f"\r\x1b[K{share}{step.note}", end="", file=sys.stderr, flush=True)


def _show_receipt(receipt: Receipt, out: Path, quiet: bool) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if quiet:
        print(json.dumps(receipt.as_dict()))
        return
    details = receipt.details
    header = ("bits", "original", "quantized", "relative loss")
    cells = (
        f"{details['bits_per_weight']:.2f}",
        format_bytes(details["original_bytes"]),
        format_bytes(receipt.disk_bytes),
        f"{details['loss']:.2e}",
    )
    for line in (header, cells):
        print("  ".join(cell.rjust(13) for cell in line))
    print(f"{receipt.model}: {receipt.precision}, in {format_seconds(receipt.seconds)}; {out}", file=sys.stderr)
    for memory, predicted in receipt.predicted.items():
        measured = format_bytes(receipt.measured[memory])
        print(f"{memory.upper()} peak: predicted {format_bytes(predicted)}, measured {measured}", file=sys.stderr)
    for note in receipt.notes:
        print(note, file=sys.stderr)
