"""`python -m lowmem compare`: variants of one model, or a grid of several, side by side."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem.cli.arguments import MODEL_HELP, add_budget, add_json, add_options, budget, check_parent, options
from lowmem.cli.console import finish, follow
from lowmem.datasets.texts import MANUAL, NAMES
from lowmem.errors import BadInput
from lowmem.events import Receipt
from lowmem.machine.baseline import measure_runtime_bytes
from lowmem.measure.compare import compare
from lowmem.measure.options import MeasureOptions
from lowmem.measure.rows import Row, to_csv, write_atomically
from lowmem.measure.variants import parse_variants
from lowmem.messages import msg
from lowmem.plots.figure import encode
from lowmem.plots.variants import picture
from lowmem.sweep.grid import read_grid
from lowmem.sweep.run import sweep
from lowmem.units import format_bytes, format_seconds

DEFAULT_VARIANTS = "fp32,bf16,int8"

COLUMNS = {
    "variant": 13,
    "bits/param": 10,
    "bits/quantized weight": 21,
    "weights": 8,
    "perplexity": 10,
    "KL": 7,
    "top-1 match": 11,
    "prefill/s": 9,
    "decode/s": 8,
    "peak": 22,
    "predicted": 9,
    "took": 12,
}
"""Headings and widths of the printed table."""


def add_command(commands: Any) -> None:
    """Add `compare` to the subparsers of the command line."""
    parser = commands.add_parser("compare", help="quality, size, speed and memory of a model's variants")
    parser.add_argument("model", nargs="?", help=f"{MODEL_HELP}; none with --grid")
    parser.add_argument(
        "--variants",
        default=DEFAULT_VARIANTS,
        metavar="LIST",
        help=f"precisions, or METHOD:BITS:GROUP; default {DEFAULT_VARIANTS}",
    )
    parser.add_argument("--reference", default="fp32", metavar="VARIANT", help="the variant to compare with")
    parser.add_argument("--text", default=MANUAL, metavar="FILE", help=f"evaluation text: a file, {' or '.join(NAMES)}")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot the table; a name ending in .svg gives SVG")
    add_budget(parser)
    add_options(parser, MeasureOptions)
    grid = parser.add_argument_group("many at once")
    grid.add_argument("--grid", type=Path, metavar="FILE", help="models x methods x settings, in YAML")
    grid.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the table; an unfinished one is resumed")
    grid.add_argument("--workers", type=int, default=0, metavar="N", help="cells at once; default: as many as fit")
    grid.add_argument("--ray", default="", metavar="ADDRESS", help="a Ray cluster to run the cells on, or auto")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_parent(args.csv)
    check_parent(args.png)
    table = Table(args.csv, args.json, grid=bool(args.grid))
    receipt = follow((_sweep if args.grid else _compare)(args), table.add)
    if args.png:
        write_atomically(args.png, encode(picture(table.rows, receipt.model, receipt.details["text"]), args.png))
    failed = tuple(f"{row['variant']}: {row['error']}" for row in receipt.details["rows"] if row["error"])
    if not args.json:  # failures are in the table
        receipt = replace(receipt, notes=tuple(note for note in receipt.notes if not note.endswith(failed)))
    return finish(receipt, args.json, *_summary(receipt))


def _compare(args: argparse.Namespace) -> Any:
    if not args.model:
        raise BadInput(msg("No model to compare."), msg("Name one, such as demo, or a grid with --grid grid.yaml."))
    variants, chosen = parse_variants(args.variants), options(args, MeasureOptions)
    measure_runtime_bytes()
    return compare(args.model, variants, args.text, reference=args.reference, options=chosen, budget=budget(args))


def _sweep(args: argparse.Namespace) -> Any:
    if args.model:
        raise BadInput(
            msg("The grid names its models, so {model} is one too many.", model=args.model[:40]), msg("Remove it.")
        )
    grid = read_grid(args.grid)
    grid = replace(grid, budget=replace(grid.budget, **budget(args).as_dict()))
    measure_runtime_bytes()
    return sweep(grid, args.out, workers=args.workers, ray=args.ray)


class Table:
    """The rows of a comparison, printed and written to a file one by one.

    Args:
        csv: file to write, or None.
        quiet: print nothing.
        grid: rows of several models, named by model and variant.
    """

    def __init__(self, csv: Path | None, quiet: bool, grid: bool) -> None:
        self.csv, self.quiet, self.grid = csv, quiet, grid
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        row = replace(row, variant=f"{row.model} {row.variant}") if self.grid else row
        self.rows.append(row)
        if self.csv:  # after every row, so that a stopped comparison leaves its finished rows
            write_atomically(self.csv, to_csv(self.rows))
        if self.quiet:
            return
        if len(self.rows) == 1:
            print(_line(tuple(COLUMNS)))
        print(f"{row.variant:<{COLUMNS['variant']}}  {row.error}" if row.error else _line(_cells(row)), flush=True)


def _line(cells: tuple[str, ...]) -> str:
    name, *others = zip(cells, COLUMNS.values(), strict=True)
    return "  ".join([name[0].ljust(name[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    def text(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def size(value: int | None) -> str:
        return "-" if value is None else format_bytes(value)

    share = row.above_prediction
    off = "" if share is None else f" ({abs(share):.1%} {'above' if share > 0 else 'below'})"
    return (
        row.variant,
        text(row.bits_per_parameter, ".1f"),
        text(row.bits_per_quantized_weight, ".2f"),
        size(row.weight_bytes),
        text(row.perplexity, ",.3f"),
        text(row.kl, ".4f"),
        text(row.agreement, ".1%"),
        text(row.prefill_tps, ",.0f"),
        text(row.decode_tps, ",.1f"),
        size(row.peak_bytes) + off,
        size(row.predicted_bytes),
        "-" if row.seconds is None else format_seconds(row.seconds),
    )


def _summary(receipt: Receipt) -> list[str]:
    details = receipt.details
    lines = [
        f"\n{receipt.model} on {receipt.device}, {details['tokens']:,} tokens of {details['text']}, "
        f"window {details['window']:,}, stride {details['stride']:,}; "
        f"speeds are medians of {details['runs']} runs; {format_seconds(receipt.seconds)} in total"
    ]
    if folder := details.get("folder"):
        lines.append(f"The table is in {folder}.")
    return lines
