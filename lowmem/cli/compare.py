"""`python -m lowmem compare`: variants of a model side by side on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.datasets.texts import MANUAL, NAMES
from lowmem.errors import BadInput
from lowmem.events import Receipt, Step
from lowmem.fields import build
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.machine.hardware import probe
from lowmem.machine.limits import limits_from
from lowmem.measure.compare import compare
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.measure.variants import parse_variants
from lowmem.plots.drawing import to_png, to_svg
from lowmem.plots.variants import picture
from lowmem.sweep.grid import read_grid
from lowmem.sweep.run import sweep
from lowmem.units import format_bytes, format_seconds, parse_bytes

DEFAULT_VARIANTS = "fp32,bf16,int8"

_COLUMNS = (
    "variant",
    "bits",
    "weights",
    "perplexity",
    "KL",
    "same top",
    "prefill/s",
    "decode/s",
    "peak",
    "predicted",
    "took",
)
_WIDTHS = (13, 5, 8, 10, 7, 8, 9, 8, 8, 17, 12)


def add_command(commands: Any) -> None:
    """Add `compare` to the command line's subparsers."""
    parser = commands.add_parser("compare", help="quality, size, speed and memory of a model's variants")
    parser.add_argument("model", nargs="?", help="demo, a hub id, a folder or a .gguf file; none with --grid")
    parser.add_argument(
        "--variants",
        default=DEFAULT_VARIANTS,
        metavar="LIST",
        help=f"precisions, and METHOD:BITS:GROUP; default {DEFAULT_VARIANTS}",
    )
    parser.add_argument("--reference", default="fp32", metavar="VARIANT", help="what the others are held against")
    parser.add_argument(
        "--text", default=MANUAL, metavar="FILE", help=f"measured on this text: a file, {' or '.join(NAMES)}"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the table; a name ending in .svg gives SVG")
    parser.add_argument("--vram", metavar="SIZE", help="GPU memory budget of each process, e.g. 6G")
    parser.add_argument("--ram", metavar="SIZE", help="RAM budget of each process, e.g. 4G")
    for field in dataclasses.fields(MeasureOptions):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(
            flag, default=field.default, metavar="N", help=f"{field.metadata['help']} Default {field.default}."
        )
    sweep = parser.add_argument_group("many at once")
    sweep.add_argument("--grid", type=Path, metavar="FILE", help="models x methods x settings, in YAML")
    sweep.add_argument("--out", type=Path, metavar="FOLDER", help="where the table is kept, and gone on from")
    sweep.add_argument("--workers", type=int, default=0, metavar="N", help="most cells side by side; as many as fit")
    sweep.add_argument("--ray", default="", metavar="ADDRESS", help="a Ray cluster that runs the cells, or auto")
    parser.add_argument("--json", action="store_true", help="nothing but the receipt, as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for path in (args.csv, args.png):
        if path is not None and not path.absolute().parent.is_dir():
            raise BadInput(f"There is no folder {path.parent}.", "Name a file in a folder that exists.")
    if args.grid:
        return run_grid(args, Shown(args.csv, args.png, args.json, grid=True))
    if not args.model:
        raise BadInput("There is no model to compare.", "Name one, such as demo, or a grid with --grid grid.yaml.")
    variants = parse_variants(args.variants)
    options = build(
        MeasureOptions, {field.name: getattr(args, field.name) for field in dataclasses.fields(MeasureOptions)}
    )
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    limits = limits_from(probe(), ram, vram) if ram is not None or vram is not None else None
    measure_runtime_bytes()
    events = compare(args.model, variants, args.text, reference=args.reference, options=options, limits=limits)
    shown = Shown(args.csv, args.png, args.json)
    for event in events:
        shown.take(event)
    return 0


class Shown:
    """Events of a comparison on the terminal and in files, as they come.

    Args:
        csv, png: files to write, or None.
        quiet: nothing but the receipt, as JSON.
        grid: rows of several models.
    """

    def __init__(self, csv: Path | None, png: Path | None, quiet: bool, grid: bool = False) -> None:
        self.csv, self.png, self.quiet, self.grid = csv, png, quiet, grid
        self.rows: list[Row] = []

    def take(self, event: Step | Row | Receipt) -> None:
        if isinstance(event, Row):
            self.rows.append(replace(event, variant=f"{event.model} {event.variant}") if self.grid else event)
            self._show_row(self.rows[-1])
            if self.csv:  # after every row: a long comparison that is stopped leaves what it has
                write_atomically(self.csv, to_csv(self.rows))
        elif isinstance(event, Step):
            _show_step(event)
        else:
            self._finish(event)

    def _finish(self, receipt: Receipt) -> None:
        if self.png:
            sheet = picture(self.rows, receipt.model, receipt.details["text"])
            write_atomically(self.png, to_svg(sheet) if self.png.suffix.lower() == ".svg" else to_png(sheet))
        _show_receipt(receipt, self.quiet)

    def _show_row(self, row: Row) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if self.quiet:
            return
        if len(self.rows) == 1:
            print(_line(_COLUMNS))
        print(f"{row.variant:<{_WIDTHS[0]}}  {row.error}" if row.error else _line(_cells(row)), flush=True)


def _show_step(step: Step) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{step.done / step.total:4.0%} {step.note}", end="", file=sys.stderr, flush=True)


def _line(cells: tuple[str, ...]) -> str:
    padded = [
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    error = row.prediction_error
    predicted = "-" if row.predicted_bytes is None else format_bytes(row.predicted_bytes)
    return (
        row.variant,
        shown(row.bits_per_weight, ".1f"),
        "-" if row.weight_bytes is None else format_bytes(row.weight_bytes),
        shown(row.perplexity, ",.3f"),
        shown(row.kl, ".4f"),
        shown(row.agreement, ".1%"),
        shown(row.prefill_tps, ",.0f"),
        shown(row.decode_tps, ",.1f"),
        "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        predicted if error is None else f"{predicted} ({error:+.1%})",
        "-" if row.seconds is None else format_seconds(row.seconds),
    )


def _show_receipt(receipt: Receipt, quiet: bool) -> None:
    if quiet:
        print(json.dumps(receipt.as_dict()))
        return
    details = receipt.details
    print(
        f"\n{receipt.model} on {receipt.device}, {details['tokens']:,} tokens of {details['text']}, window {details['window']:,}, "
        f"stride {details['stride']:,}; speeds are medians of {details['runs']} runs; {format_seconds(receipt.seconds)} in all",
        file=sys.stderr,
    )
    failed = tuple(f"{row['variant']}: {row['error']}" for row in details["rows"] if row["error"])
    for note in receipt.notes:
        if not note.endswith(failed):
            print(note, file=sys.stderr)
    if folder := details.get("folder"):
        print(f"The table is in {folder}.", file=sys.stderr)


def run_grid(args: argparse.Namespace, shown: Shown) -> int:
    """Run the sweep that the flags of `compare` describe.

    Raises:
        LowMemError: see `sweep`.
    """
    if args.model:
        raise BadInput(f"The grid names the models, so {args.model[:40]} is one too many.", "Leave it out.")
    grid = read_grid(args.grid)
    ram, vram = (None if size is None else parse_bytes(size) for size in (args.ram, args.vram))
    grid = replace(grid, ram=ram or grid.ram, vram=vram or grid.vram)
    measure_runtime_bytes()
    for event in sweep(grid, args.out, workers=args.workers, ray=args.ray):
        shown.take(event)
    return 0
